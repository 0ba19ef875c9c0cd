// What is shown of a connection: lines of several kinds, appended a frame at a time and bounded in number.

const MAX_PIECES = 4000;
const MAX_PENDING = 1 << 20;
// Colours and cursor movements of programs: this is no terminal.
const ESCAPES = /\x1b(?:\[[0-9;:?<=>]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])/g;

export class Screen {
  constructor(view, lines) {
    this.view = view;
    this.lines = lines;
    this.pending = [];
    this.pendingLength = 0;
    this.skipped = 0;
    this.cut = false;
    this.last = null;
  }

  /** Text as it came: it goes on in the line that is open. */
  write(kind, text) {
    text = text.replace(ESCAPES, "").replaceAll("\r\n", "\n");
    if (!text) return;
    if (this.pendingLength > MAX_PENDING) {
      this.skipped += text.length;
      return;
    }
    this.pendingLength += text.length;
    this.pending.push([kind, text]);
    if (this.pending.length === 1) requestAnimationFrame(() => this.flush());
  }

  /** A line of its own. */
  tell(kind, text) {
    this.write(kind, `\u0000${text}\n`);
  }

  clear() {
    this.pending = [];
    this.pendingLength = 0;
    this.lines.replaceChildren();
    this.last = null;
    this.cut = false;
  }

  flush() {
    const view = this.view;
    const atEnd = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
    const pieces = this.pending;
    this.pending = [];
    this.pendingLength = 0;
    if (this.skipped) {
      pieces.push(["notice", `\u0000… ${this.skipped.toLocaleString("en")} characters came too fast to be shown\n`]);
      this.skipped = 0;
    }
    for (const [kind, text] of pieces) this.append(kind, text);
    while (this.lines.childNodes.length > MAX_PIECES) {
      this.lines.firstChild.remove();
      this.cut = true;
    }
    if (this.cut && this.lines.firstChild?.className !== "notice cut") {
      const note = document.createElement("span");
      note.className = "notice cut";
      note.textContent = "… what came before is no longer kept\n";
      this.lines.prepend(note);
    }
    if (atEnd) view.scrollTop = view.scrollHeight;
  }

  append(kind, text) {
    if (text.startsWith("\u0000")) {
      text = text.slice(1);
      if (this.last !== null && !this.last.endsWith("\n")) text = `\n${text}`;
    }
    text = text.replaceAll("\u0000", "␀");
    const open = this.lines.lastChild;
    if (open?.dataset.kind === kind && open.textContent.length < 4000) {
      open.lastChild.appendData(text);
    } else {
      const piece = document.createElement("span");
      piece.className = kind;
      piece.dataset.kind = kind;
      piece.textContent = text;
      this.lines.append(piece);
    }
    this.last = text;
  }
}
