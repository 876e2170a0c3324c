// What a ByteView shows: bytes, their characters and lines, numbers and their scale, as text.
// This file stands in front of byteview.js: together they are one module (byteview_page.SCRIPT).

const GIVEN = 1, MASKED = 2, START = 4, CHANGED = 8, LOCKED = 16;
const FLAGS = [[GIVEN, "given"], [MASKED, "masked"], [START, "start"], [CHANGED, "changed"], [LOCKED, "locked"]];
const CONTINUED = 0, LONE = 5; // kinds of bytes; 1 is ASCII, 2 to 4 starts a character of so many
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cn}\p{Co}\p{Zl}\p{Zp}]/u; // draws nothing or moves its neighbours
const WIDE = /[\p{Emoji_Presentation}\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6\u{20000}-\u{3fffd}]/u;
const NAMES = { 0x0a: "\u23ce", 0x09: "\u21e5", 0x0d: "\u240d", 0x20: "\u2423", 0x7f: "\u2421" };
const UNITLESS = ["rank", "step"]; // as byteview_page.UNITLESS

const hex2 = (byte) => byte.toString(16).padStart(2, "0");
const short = (x) => String(+x.toFixed(2));
const whole = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength).slice();

function label(byte) { // as byteview_page.label
  if (NAMES[byte]) return NAMES[byte];
  if (byte < 0x20) return String.fromCharCode(0x2400 + byte);
  return byte < 0x80 ? String.fromCharCode(byte) : hex2(byte);
}

// Columns in typed arrays that grow: n bytes, flags, layers of numbers, k expected bytes for each.
class Bytes {
  constructor() {
    this.n = 0;
    this.k = 0;
    this.names = [];
    this.layers = {};
    for (const name of ["data", "flags", "kinds", "ids"]) this[name] = new Uint8Array(0);
    this.probs = new Uint16Array(0);
  }

  fit(n, k) { // room for n bytes and k expected ones for each
    const old = this.data.length, room = n <= old ? old : Math.max(n, 2 * old, 1024);
    if (room === old && k === this.k) return;
    const longer = (column, fill) => {
      const copy = new column.constructor(room).fill(fill);
      copy.set(column);
      return copy;
    };
    const wider = (table) => {
      const copy = new table.constructor(room * k);
      for (let i = 0; i < this.n; i++) copy.set(table.subarray(i * this.k, (i + 1) * this.k), i * k);
      return copy;
    };
    for (const name of ["data", "flags", "kinds"]) this[name] = longer(this[name], 0);
    for (const name of this.names) this.layers[name] = longer(this.layers[name], NaN);
    for (const name of ["ids", "probs"]) this[name] = wider(this[name]);
    this.k = k;
  }

  write({ names, k }, buffers, place, n) { // byte i of a message goes to place(i); n bytes then
    const [data, flags, numbers, ids, shares] = buffers.slice(0, 5).map(whole);
    const values = new Float32Array(numbers.buffer), probs = new Uint16Array(shares.buffer);
    for (const name of names.filter((other) => !this.names.includes(other))) {
      this.names.push(name);
      this.layers[name] = new Float32Array(this.data.length).fill(NaN);
    }
    this.fit(n, Math.max(this.k, k));
    const columns = this.names.map((name) => [this.layers[name], names.indexOf(name)]);
    for (let i = 0; i < data.length; i++) {
      const at = place(i);
      this.data[at] = data[i];
      this.flags[at] = flags[i];
      for (const [layer, from] of columns) layer[at] = from < 0 ? NaN : values[from * data.length + i];
      for (let j = 0; j < this.k; j++) {
        this.ids[at * this.k + j] = j < k ? ids[i * k + j] : 0;
        this.probs[at * this.k + j] = j < k ? probs[i * k + j] : 0;
      }
    }
    this.n = n;
  }

  character(i) { // the one that starts at i, if all its bytes are there, well formed and visible
    const byte = this.data[i], size = byte < 0xc2 ? 0 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : byte < 0xf5 ? 4 : 0;
    if (!size || i + size > this.n || this.flags[i] & MASKED) return "";
    let point = byte & (0x7f >> size);
    for (let j = i + 1; j < i + size; j++) {
      if (this.flags[j] & MASKED || (this.data[j] & 0xc0) !== 0x80) return "";
      point = point * 64 + (this.data[j] & 0x3f);
    }
    const long = point < [0, 0x800, 0x10000][size - 2]; // longer than it need be
    if (long || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) return "";
    const text = String.fromCodePoint(point);
    return UNSEEN.test(text) ? "" : text;
  }

  classify(from) { // kinds from there on; returns where it began: a character may end there
    for (let j = 1; j <= 3 && j <= from && this.data[from - j] >= 0x80; j++) {
      if (this.data[from - j] >= 0xc0) { from -= j; break; }
    }
    for (let i = from; i < this.n;) {
      const byte = this.data[i], ascii = byte < 0x80 || this.flags[i] & MASKED;
      const size = ascii ? 1 : !this.character(i) ? 0 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
      this.kinds[i] = size || LONE;
      this.kinds.fill(CONTINUED, i + 1, i + size);
      i += size || 1;
    }
    return from;
  }

  first(i) { // of the bytes of the character that byte i belongs to
    while (i > 0 && this.kinds[i] === CONTINUED) i--;
    return i;
  }

  width(i) { // of what is drawn, in quarters of a column
    const kind = this.kinds[i];
    if (kind === CONTINUED) return 1;
    return kind === LONE || (kind > 1 && WIDE.test(this.character(i))) ? 8 : 4;
  }

  breakLines(starts, row, columns, hex, wrap) { // starts of the rows, anew after that row
    const { n, data, flags, kinds } = this;
    starts.length = row + 1;
    let start = starts[row], used = 0, blank = -1;
    const open = (i) => { starts.push(i); start = i; used = 0; blank = -1; };
    if (hex) {
      const step = Math.max(8, 8 * Math.floor(columns / 24));
      while (start + step < n) open(start + step);
      return;
    }
    for (let i = start; i < n; i++) {
      if (kinds[i] === CONTINUED) continue;
      const width = this.width(i) + (kinds[i] > 1 && kinds[i] < LONE ? kinds[i] - 1 : 0);
      if (used + width > 4 * columns && i > start) {
        open(wrap && blank > start ? blank : i);
        i = start - 1;
        continue;
      }
      used += width;
      if (flags[i] & MASKED) continue;
      if (data[i] === 0x20) blank = i + 1;
      if (data[i] === 0x0a && i + 1 < n) open(i + 1);
    }
  }

  expected(i) { // [{byte, share}], the likeliest first
    const list = [];
    for (let j = i * this.k; i >= 0 && i < this.n && j < (i + 1) * this.k; j++) {
      if (this.probs[j]) list.push({ byte: this.ids[j], share: this.probs[j] / 65535 });
    }
    return list;
  }
}

// Sums over the first `upto` numbers of a layer: a stream adds to them.
const newSums = (name) => ({ name, upto: 0, count: 0, sum: 0, squares: 0, min: Infinity, max: -Infinity });

function addUp(sums, values, n) {
  for (; values && sums.upto < n; sums.upto++) {
    const v = values[sums.upto];
    if (!Number.isFinite(v)) continue;
    sums.count++;
    sums.sum += v;
    sums.squares += v * v;
    sums.min = Math.min(sums.min, v);
    sums.max = Math.max(sums.max, v);
  }
}

function scaleOf({ count, sum, squares, min, max }) { // as byteview_page.scale
  if (!count) return [0, 1];
  const mean = sum / count, reach = 2.5 * Math.sqrt(Math.max(0, squares / count - mean * mean));
  let low = Math.max(min, mean - reach), high = Math.min(max, mean + reach);
  if (min < 0) {
    high = Math.max(-low, high);
    low = -high;
  }
  return [low, high > low ? high : low + 1];
}
