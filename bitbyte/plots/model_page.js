// A model in a page: the native engine as WebAssembly, a sampler, and what each byte of a text costs.
//
// model_page.py puts the engine's operations and memory into the page, model_page.html has the
// controls, model_page_codec.js compresses; the views are those of byteview.js.  Numbers of the engine have the bits of Python's.

const WORDS = 16; // numbers of an operation: its kernel's place in the table, and its arguments
const BYTES = 256, FIRST = 256; // byte values; the id before a text
const ALTERNATIVES = 5, BARS = 12;
const READ_LIMIT = 200000; // bytes of a text
const PACK_LIMIT = 1 << 26; // bytes of a file to compress or restore
const TABS = ["write", "read", "pack"];
const ENDING = ".bitbyte";
const SLICE = 30; // ms of work between two updates of the page
const SETTINGS = ["temperature", "top_k", "top_p", "min_p", "penalty", "reach"];
const find = (id) => document.getElementById(id);
const stored = (id) => Uint8Array.from(atob(find(id).textContent.trim()), (c) => c.charCodeAt(0));
const unzip = (bytes) => new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();

class Engine {
  static async open() {
    const facts = JSON.parse(find("engine").textContent);
    const [code, weights] = await Promise.all(["kernels", "weights"].map((id) => unzip(stored(id))));
    let size = facts.size;
    const programs = {};
    for (const [name, rows] of Object.entries(facts.operations)) {
      programs[name] = { at: size, n: rows.length };
      size += rows.length * WORDS * 8;
    }
    const memory = new WebAssembly.Memory({ initial: Math.ceil(size / 65536) + 1 });
    const { instance } = await WebAssembly.instantiate(code, { env: { memory } });
    return new Engine(facts, programs, memory.buffer, instance.exports, new Uint8Array(weights));
  }

  constructor(facts, programs, memory, code, weights) {
    Object.assign(this, { facts, programs, memory, code });
    this.numbers = new BigInt64Array(memory);
    for (const [at, size, from] of facts.parts) {
      new Uint8Array(memory, at, size).set(weights.subarray(from, from + size));
    }
    const table = code.__indirect_function_table, base = table.length;
    table.grow(facts.kernels.length);
    facts.kernels.forEach((name, i) => table.set(base + i, code[name]));
    for (const [name, rows] of Object.entries(facts.operations)) {
      rows.forEach((row, i) => this.put(programs[name].at + i * WORDS * 8, base + row[0], ...row.slice(1)));
    }
    this.clear();
  }

  put(at, ...values) {
    values.forEach((value, i) => { this.numbers[at / 8 + i] = BigInt(value); });
  }

  clear() {
    this.ids = []; // of the window
    for (const [at, size] of this.facts.caches) this.new(at, Uint8Array, size).fill(0);
    this.new(this.facts.seen, BigInt64Array, BYTES + 1).fill(-(1n << 40n))[BYTES] = 0n;
  }

  new(at, kind, n) {
    return new kind(this.memory, at, n);
  }

  run(name, context, rows, last) {
    this.put(context, rows, this.ids.length, rows, last, 0, this.facts.ids);
    const { at, n } = this.programs[name];
    this.code.run_program(BigInt(at), BigInt(n), BigInt(context), 1n);
  }

  // Feed ids, at most `facts.piece`; with `all`, there are logits after each, else after the last.
  piece(ids, all, name = "step") {
    this.put(this.facts.ids, ...ids);
    this.run(name, this.facts.context, ids.length, all ? 0 : 1);
    this.ids.push(...ids);
  }

  logits(rows = 1) {
    return this.new(this.facts.logits, Float32Array, rows * BYTES);
  }

  // The counts that Python's compression uses, after each of a few ids.
  counts(ids) {
    this.piece(ids, true, "count");
    return this.new(this.facts.counts, Uint32Array, ids.length * BYTES).slice();
  }

  feed(ids) {
    for (let i = 0; i < ids.length; i += this.facts.piece) {
      this.piece(ids.slice(i, i + this.facts.piece), false);
    }
  }

  // Begin a window with the bytes that fit, leaving room for one more.
  begin(bytes) {
    this.clear();
    this.feed([FIRST, ...bytes.slice(-(this.facts.window - 2))]);
  }

  full() {
    return this.ids.length >= this.facts.window;
  }

  // Draw a byte from the last logits and feed it: [byte, the logits it was drawn from].
  draw(point, settings) {
    this.new(this.facts.points, Float64Array, 1)[0] = point;
    this.new(this.facts.settings, Float64Array, SETTINGS.length).set(settings);
    this.run("draw", this.facts.drawing, 1, 0);
    const byte = Number(this.numbers[this.facts.chosen / 8]);
    this.ids.push(byte);
    return [byte, this.new(this.facts.kept, Float32Array, BYTES)];
  }
}

// What logits say: natural logarithms of probabilities.
function logProbs(logits) {
  let top = -Infinity, sum = 0;
  for (const x of logits) if (x > top) top = x;
  for (const x of logits) sum += Math.exp(x - top);
  const rest = top + Math.log(sum);
  return Float64Array.from(logits, (x) => x - rest);
}

// A view of bytes with their costs, to which more can be appended.
class Costs {
  constructor(el, height) {
    this.el = el;
    this.state = { ...{ layer: "surprisal", units: {}, start: 0, cursor: -1, selection: [0, 0], choice: [] },
      ...{ hex: false, wrap: true, low: 0, high: 10, height, controls: true, locked: true } };
    this.clear();
  }

  clear() {
    this.view?.close(); // it listens to the page
    this.el.replaceChildren();
    this.heard = {};
    this.serial = 0;
    this.n = 0;
    this.bits = 0;
    this.rows = [];
    const model = {
      get: (name) => this.state[name],
      set: (name, value) => { this.state[name] = value; this.heard[`change:${name}`]?.(); },
      on: (event, act) => { this.heard[event] = act; },
      off: () => {},
      save_changes: () => {},
      send: () => this.send("all", 0),
    };
    this.view = new View(model, this.el);
  }

  // A byte and the log probabilities it was predicted with; none for a byte that was given.
  add(byte, logs) {
    const row = { byte, flags: logs ? 0 : 1, cost: NaN, entropy: NaN, ids: [], probs: [] };
    if (logs) {
      row.cost = -logs[byte] / Math.LN2;
      row.entropy = -logs.reduce((sum, x) => sum + Math.exp(x) * x, 0) / Math.LN2;
      row.ids = likeliest(logs, ALTERNATIVES);
      row.probs = row.ids.map((id) => Math.exp(logs[id]));
      this.bits += row.cost;
      this.n += 1;
    }
    this.rows.push(row);
  }

  // Show what was added since the last call.
  show() {
    if (this.sent === this.rows.length && this.serial) return;
    this.send("append", this.sent ?? 0);
  }

  send(op, start) {
    const rows = this.rows.slice(start), n = rows.length;
    const floats = new Float32Array(2 * n), ids = new Uint8Array(ALTERNATIVES * n);
    const probs = new Uint16Array(ALTERNATIVES * n);
    rows.forEach((row, i) => {
      floats[i] = row.cost;
      floats[n + i] = row.entropy;
      ids.set(row.ids, ALTERNATIVES * i);
      probs.set(row.probs.map((p) => Math.round(p * 65535)), ALTERNATIVES * i);
    });
    const columns = [Uint8Array.from(rows, (r) => r.byte), Uint8Array.from(rows, (r) => r.flags), floats, ids, probs];
    const message = { op, serial: ++this.serial, names: ["surprisal", "entropy"], k: ALTERNATIVES, start };
    this.sent = this.rows.length;
    this.heard["msg:custom"]?.(message, columns.map((c) => new DataView(c.buffer)));
  }
}

function likeliest(values, k) {
  return [...values.keys()].sort((a, b) => values[b] - values[a] || a - b).slice(0, k);
}

// Numbers in [0, 1), the same for a seed (sfc32).
function* points(seed) {
  let [a, b, c, d] = [0x9e3779b9, 0x243f6a88, 0xb7e15162, seed >>> 0];
  const next = () => {
    const t = (a + b + d) | 0;
    d = (d + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = ((c << 21) | (c >>> 11)) + t | 0;
    return t >>> 0;
  };
  for (let i = 0; i < 16; i++) next();
  while (true) yield ((next() >>> 5) * 67108864 + (next() >>> 6)) / 9007199254740992;
}

const pause = () => new Promise((resume) => setTimeout(resume));

class Page {
  constructor(engine) {
    this.engine = engine;
    this.written = new Costs(find("written"), 320);
    this.costs = new Costs(find("costs"), 420);
    this.history = []; // bytes written and given
    this.busy = false;
    for (const slider of document.querySelectorAll("input[type=range]")) {
      const show = () => { slider.nextElementSibling.textContent = slider.value; this.drawBars(); };
      slider.addEventListener("input", show);
      slider.nextElementSibling.textContent = slider.value;
    }
    find("go").addEventListener("click", () => this.work(() => this.write(true)));
    find("more").addEventListener("click", () => this.work(() => this.write(false)));
    find("stop").addEventListener("click", () => { this.stopped = true; });
    find("measure").addEventListener("click", () => {
      this.work(() => this.read(new TextEncoder().encode(find("text").value)));
    });
    for (const [id, take] of [["file", this.readFile], ["file-pack", this.packFile]]) {
      find(id).addEventListener("change", () => {
        if (find(id).files.length) take.call(this, find(id).files[0]);
        find(id).value = "";
      });
    }
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      const [file] = event.dataTransfer.files;
      if (file) find("pack").hidden ? this.readFile(file) : this.packFile(file);
    });
    for (const name of TABS) find(`tab-${name}`).addEventListener("click", () => this.open(name));
    this.enable();
    this.say("ready");
  }

  open(name) {
    this.say("");
    for (const other of TABS) {
      find(other).hidden = other !== name;
      find(`tab-${other}`).setAttribute("aria-selected", String(other === name));
    }
  }

  say(text) {
    find("status").textContent = text;
  }

  enable() {
    for (const id of ["go", "measure"]) find(id).disabled = this.busy;
    find("more").disabled = this.busy || !this.history.length;
    find("stop").disabled = !this.busy;
  }

  async work(job) {
    if (this.busy) return;
    this.busy = true;
    this.stopped = false;
    this.enable();
    try {
      await job();
    } catch (error) {
      this.say(`error: ${error.message}`);
    } finally {
      this.busy = false;
      this.enable();
      this.drawBars();
    }
  }

  settings() {
    const [temperature, top_p, min_p] = ["temperature", "top_p", "min_p"].map((id) => Number(find(id).value));
    return temperature ? [temperature, BYTES, top_p, min_p, 1, 64] : [1, 1, 1, 0, 1, 64];
  }

  async write(afresh) {
    const { engine } = this;
    if (afresh) {
      this.written.clear();
      this.history = [...new TextEncoder().encode(find("prompt").value)];
      this.history.forEach((byte) => this.written.add(byte, null));
      engine.begin(this.history);
      this.random = points(Number(find("seed").value));
    } else if (this.reading) {
      engine.begin(this.history);
    }
    this.reading = false;
    const field = find("length"), clock = performance.now();
    const length = Math.min(field.max, Math.max(1, Math.floor(Number(field.value)) || 1));
    field.value = length; // what is written, whatever was typed
    let slice = clock, n = 0;
    for (; n < length && !this.stopped; n++) {
      if (engine.full()) engine.begin(this.history.slice(-(engine.facts.window >> 1)));
      const [byte, logits] = engine.draw(this.random.next().value, this.settings());
      this.written.add(byte, logProbs(logits));
      this.history.push(byte);
      if (performance.now() - slice > SLICE) {
        this.written.show();
        this.say(`${n + 1} of ${length} bytes, ${rateOf(n + 1, clock)}`);
        await pause();
        slice = performance.now();
      }
    }
    this.written.show();
    const mean = this.written.n ? (this.written.bits / this.written.n).toFixed(2) : "-";
    this.say(`${n} bytes, ${rateOf(n, clock)}, ${mean} bits each`);
  }

  // The likeliest next bytes; what the settings cut is gray.  A click writes that byte.
  drawBars() {
    const bars = find("bars");
    bars.replaceChildren();
    if (!this.history.length || this.reading || this.busy) return;
    const logs = logProbs(this.engine.logits()), order = likeliest(logs, BYTES);
    const [temperature, top_k, top_p, min_p] = this.settings();
    const heated = order.map((id) => Math.exp((logs[id] - logs[order[0]]) / temperature));
    const mass = heated.slice(0, top_k).reduce((a, b) => a + b, 0);
    let sum = 0;
    order.slice(0, BARS).forEach((byte, rank) => {
      const kept = rank < top_k && (rank === 0 || sum < top_p * mass) && heated[rank] >= min_p;
      sum += heated[rank];
      const bar = make("button", kept ? "" : "cut", "", bars), p = Math.exp(logs[byte]);
      make("b", "", named(byte), bar);
      make("i", "", "", bar).style.width = `${100 * p}%`;
      make("span", "", `${(100 * p).toFixed(1)} %`, bar);
      bar.title = kept ? `write ${named(byte)}` : `write ${named(byte)}, which your settings would not`;
      bar.addEventListener("click", () => this.work(() => this.choose(byte, logs)));
    });
  }

  choose(byte, logs) {
    if (this.engine.full()) this.engine.begin(this.history.slice(-(this.engine.facts.window >> 1)));
    this.written.add(byte, logs);
    this.history.push(byte);
    this.engine.feed([byte]);
    this.written.show();
  }

  // Stop what runs.
  async idle() {
    while (this.busy) {
      this.stopped = true;
      await pause();
    }
  }

  async readFile(file) {
    this.open("read");
    await this.idle();
    this.work(async () => this.read(new Uint8Array(await file.slice(0, READ_LIMIT).arrayBuffer()), file.size));
  }

  async packFile(file) {
    this.open("pack");
    await this.idle();
    this.work(async () => this.pack(file));
  }

  // Compress a file, or restore it if it is a compressed one, and offer the result.
  async pack(file) {
    if (file.size > PACK_LIMIT) throw new Error(`the file has more than ${PACK_LIMIT / (1 << 20)} MiB`);
    const bytes = new Uint8Array(await file.arrayBuffer()), restoring = isCoded(bytes);
    const verb = restoring ? "restored" : "compressed", clock = performance.now();
    let slice = clock;
    const old = find("packed").firstChild;
    if (old) URL.revokeObjectURL(old.href); // frees the bytes
    find("packed").replaceChildren();
    this.reading = true;
    const codec = new Codec(this.engine, async (done) => {
      if (this.stopped) throw new Error("stopped");
      if (performance.now() - slice < SLICE) return;
      this.say(`${done.toLocaleString("en")} bytes ${verb}, ${rateOf(done, clock)}`);
      await pause();
      slice = performance.now();
    });
    const made = await (restoring ? codec.decompress(bytes) : codec.compress(bytes));
    const link = make("a", "", "", find("packed"));
    link.download = restoring ? file.name.replace(/\.bitbyte$/, "") || "restored" : file.name + ENDING;
    link.href = URL.createObjectURL(new Blob([made]));
    link.textContent = `save ${link.download}`;
    const [original, coded] = restoring ? [made.length, bytes.length] : [bytes.length, made.length];
    const bpb = original ? `, ${((8 * coded) / original).toFixed(4)} bits per byte` : "";
    this.say(`${verb}: ${bytes.length.toLocaleString("en")} -> ${made.length.toLocaleString("en")} bytes${bpb}, ${rateOf(original, clock)}`);
  }

  // The cost of each byte, in the windows of `bitbyte eval`: the last one is as long as the others.
  async read(bytes, size = bytes.length) {
    const { engine, costs } = this, { window, piece } = engine.facts;
    if (!bytes.length) throw new Error("there are no bytes to read");
    this.reading = true;
    costs.clear();
    bytes = bytes.slice(0, READ_LIMIT);
    let slice = performance.now();
    for (let first = 0; first < bytes.length && !this.stopped; first += window) {
      const start = Math.max(0, Math.min(first, bytes.length - window));
      const own = bytes.slice(start, start + window), ids = [FIRST, ...own.slice(0, -1)];
      engine.clear();
      for (let i = 0; i < ids.length && !this.stopped; i += piece) {
        const fed = ids.slice(i, i + piece);
        engine.piece(fed, true);
        fed.forEach((_, j) => {
          const logits = engine.logits(fed.length).slice(j * BYTES, (j + 1) * BYTES);
          if (start + i + j >= first) costs.add(own[i + j], logProbs(logits));
        });
        if (performance.now() - slice > SLICE) {
          costs.show();
          this.report(size);
          await pause();
          slice = performance.now();
        }
      }
    }
    costs.show();
    this.report(size);
  }

  report(size) {
    const { n, bits } = this.costs;
    const of = size > n ? ` of ${size.toLocaleString("en")}` : "";
    find("cost").textContent = n ? `${(bits / n).toFixed(4)} bits per byte over ${n.toLocaleString("en")}${of} bytes` : "";
  }
}

const rateOf = (n, clock) => `${Math.round((1000 * n) / (performance.now() - clock)).toLocaleString("en")} a second`;

function named(byte) {
  return byte > 32 && byte < 127 ? String.fromCharCode(byte) : byte === 32 ? "space" : byte === 10 ? "line end" : byte.toString(16).padStart(2, "0");
}

async function start() {
  try {
    globalThis.bitbyte = new Page(await Engine.open());
  } catch (error) {
    find("status").textContent = `this browser cannot run the model: ${error.message}`;
  }
}
