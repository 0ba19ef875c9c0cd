// What is shown of a connection: lines of several kinds, appended a frame at a time and bounded in number.

const MAX_KEPT = 150_000;
const MAX_PENDING = 40_000;
const MAX_PIECE = 4_000;
// Colours and cursor movements of programs: this is no terminal.
const ESCAPES = /\x1b(?:\[[0-9;:?<=>]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])/g;

export class Screen {
  constructor(view, lines) {
    this.view = view;
    this.lines = lines;
    // Whoever scrolled back to read stays there; else the end is shown.
    this.following = true;
    view.addEventListener("scroll", () => {
      this.following = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
    });
    new ResizeObserver(() => this.follow()).observe(view);
    this.clear();
  }

  clear() {
    this.pending = [];
    this.pendingLength = 0;
    this.skipped = 0;
    this.kept = 0;
    this.cut = false;
    this.lineOpen = false;
    this.lines.replaceChildren();
  }

  /** Text as it came: it goes on in the line that is open. */
  write(kind, text) {
    text = text.replace(ESCAPES, "").replaceAll("\r\n", "\n");
    if (text) this.put({ kind, text, own: false });
  }

  /** A line of its own. */
  tell(kind, text) {
    this.put({ kind, text: `${text}\n`, own: true });
  }

  put(piece) {
    if (this.pending.length === 0) requestAnimationFrame(() => this.flush());
    // No parts that are too large to be dropped one by one.
    for (let at = 0; at < piece.text.length; at += MAX_PIECE) {
      const part = { ...piece, text: piece.text.slice(at, at + MAX_PIECE), own: piece.own && at === 0 };
      this.pending.push(part);
      this.pendingLength += part.text.length;
    }
    // Nobody reads this fast: what is shown is the end.
    while (this.pendingLength > MAX_PENDING) {
      const { text } = this.pending.shift();
      this.pendingLength -= text.length;
      this.skipped += text.length;
    }
  }

  flush() {
    if (this.skipped) {
      const told = `… ${this.skipped.toLocaleString("en")} characters came too fast to be shown\n`;
      this.append({ kind: "notice", text: told, own: true });
    }
    for (const piece of this.pending) this.append(piece);
    this.pending = [];
    this.pendingLength = 0;
    this.skipped = 0;
    while (this.kept > MAX_KEPT) {
      this.kept -= this.lines.firstChild.textContent.length;
      this.lines.firstChild.remove();
      this.cut = true;
    }
    if (this.cut && this.lines.firstChild?.dataset.kind !== "cut") {
      this.lines.prepend(this.span("cut", "… what came before is no longer kept\n"));
    }
    this.follow();
  }

  follow() {
    if (this.following) this.view.scrollTop = this.view.scrollHeight;
  }

  append({ kind, text, own }) {
    if (own && this.lineOpen) text = `\n${text}`;
    this.lineOpen = !text.endsWith("\n");
    const open = this.lines.lastChild;
    if (open?.dataset.kind === kind && open.textContent.length + text.length <= MAX_PIECE) {
      open.lastChild.appendData(text);
      this.kept += text.length;
    } else this.lines.append(this.span(kind, text));
  }

  span(kind, text) {
    const made = document.createElement("span");
    made.className = kind;
    made.dataset.kind = kind;
    made.textContent = text;
    this.kept += text.length;
    return made;
  }
}
