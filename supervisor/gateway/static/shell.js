// Command lines on the bundled agent: JSON-RPC 2.0, one `process.start` a line, the working directory kept between.

// The line runs in this shell, so that `cd` counts; then the mark tells where it ended.
const SCRIPT = `_line=$1 _mark=$3
[ -z "$2" ] || cd -- "$2" || exit
set --
eval "$_line"
_status=$?
printf '%s%s\\n%s' "$_mark" "$PWD" "$TENANTRY_WORKSPACE"
exit $_status`;

export class Shell {
  /** `on` hears: output(kind, text), notice(text), foreign(text), changed(). */
  constructor(send, on) {
    this.send = send;
    this.on = on;
    this.calls = new Map();
    this.count = 0;
    this.process = null;
    this.starting = false;
    this.directory = "";
    this.workspace = "";
    this.mark = `\u001e${[...crypto.getRandomValues(new Uint8Array(8))].map((b) => b.toString(16)).join("")}:`;
    this.tail = "";
    this.marked = null;
    this.decoders = {};
  }

  get busy() {
    return this.process !== null || this.starting;
  }

  get place() {
    const { directory, workspace } = this;
    if (!directory || directory === workspace) return "";
    return workspace && directory.startsWith(`${workspace}/`) ? directory.slice(workspace.length + 1) : directory;
  }

  /** A command line, or while one runs a line of its input. */
  async line(text) {
    if (this.process !== null) {
      await this.tryCall("process.stdin", { id: this.process, data: `${text}\n` });
      return;
    }
    this.starting = true;
    this.tail = "";
    this.marked = null;
    this.decoders = { stdout: new TextDecoder(), stderr: new TextDecoder() };
    this.on.changed();
    const argv = ["sh", "-c", SCRIPT, "sh", text, this.directory, this.mark];
    const started = await this.tryCall("process.start", { argv });
    this.starting = false;
    if (started) this.process = started.id;
    this.on.changed();
  }

  async interrupt() {
    if (this.process !== null) await this.tryCall("process.signal", { id: this.process, signal: "SIGINT" });
  }

  async endInput() {
    if (this.process !== null) await this.tryCall("process.stdin", { id: this.process, eof: true });
  }

  async tryCall(method, params) {
    try {
      return await this.call(method, params);
    } catch (error) {
      this.on.notice(error.message);
      return null;
    }
  }

  call(method, params) {
    const id = ++this.count;
    return new Promise((resolve, reject) => {
      this.calls.set(id, { resolve, reject });
      this.send(JSON.stringify({ jsonrpc: "2.0", id, method, params }));
    });
  }

  /** The connection is gone: nobody will answer. */
  end() {
    for (const { reject } of this.calls.values()) reject(new Error("The connection ended before the agent answered."));
    this.calls.clear();
    this.process = null;
    this.starting = false;
  }

  receive(data) {
    let message = null;
    try {
      message = JSON.parse(data);
    } catch {
      // Not ours: shown as it is.
    }
    if (message?.jsonrpc !== "2.0") return this.on.foreign(data);
    if (message.method === "process.output") return this.output(message.params);
    if (message.method === "process.exit") return this.exit(message.params);
    const waiting = this.calls.get(message.id);
    if (waiting === undefined) return message.error && this.on.notice(message.error.message);
    this.calls.delete(message.id);
    if (message.error) waiting.reject(new Error(message.error.message));
    else waiting.resolve(message.result);
  }

  output({ id, stream, data, encoding }) {
    if (id !== this.process) return;
    let text = data;
    if (encoding === "base64") {
      const bytes = Uint8Array.from(atob(data), (mark) => mark.charCodeAt(0));
      text = this.decoders[stream].decode(bytes, { stream: true });
    }
    if (stream === "stderr") this.on.output("stderr", text);
    else this.on.output("stdout", this.withoutMark(text));
  }

  /** Cuts the mark and what follows it out of the output, wherever the parts were cut. */
  withoutMark(text) {
    if (this.marked !== null) {
      this.marked += text;
      return "";
    }
    text = this.tail + text;
    const at = text.indexOf(this.mark);
    if (at >= 0) {
      this.tail = "";
      this.marked = text.slice(at + this.mark.length);
      return text.slice(0, at);
    }
    let held = Math.min(this.mark.length - 1, text.length);
    while (held > 0 && !this.mark.startsWith(text.slice(text.length - held))) held -= 1;
    this.tail = text.slice(text.length - held);
    return text.slice(0, text.length - held);
  }

  exit({ id, returncode, signal, output_complete: complete, left_behind: leftBehind }) {
    if (id !== this.process) return;
    if (this.tail) this.on.output("stdout", this.tail);
    if (this.marked !== null) [this.directory, this.workspace] = this.marked.split("\n");
    this.process = null;
    if (signal) this.on.notice(`ended by ${signal}`);
    else if (returncode) this.on.notice(`exit status ${returncode}`);
    if (complete === false) this.on.notice("some output was lost");
    if (leftBehind) this.on.notice(`${leftBehind} of its processes were still running, and were ended`);
    this.on.changed();
  }
}
