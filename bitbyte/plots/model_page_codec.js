// Files coded with the model alone, as `bitbyte compress MODEL FILE OUT --mode native --lanes 1` does.
//
// container.py describes the bytes of such a file, rans.py the coder.  What this writes equals what
// Python writes, byte for byte; each side reads the other's files.

const MAGIC = [0x89, 0x42, 0x42, 0x5a, 0x0d, 0x0a, 0x1a, 0x0a], VERSION = 1, NATIVE = 2;
const HEADER = 68, BLOCK_HEAD = 12, CRC = 4, HASH = 32; // sizes in bytes
const CODED_BLOCK = 1 << 20;
const TOTAL_BITS = 24n, SLOT = (1n << TOTAL_BITS) - 1n, LOW = 1n << 32n, WORD = LOW - 1n, ROOM = 40n;

const isCoded = (bytes) => MAGIC.every((byte, i) => bytes[i] === byte);
const fromHex = (text) => Uint8Array.from(text.match(/../g), (pair) => parseInt(pair, 16));

function joined(parts) {
  const all = new Uint8Array(parts.reduce((n, part) => n + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

// The bytes, and their CRC-32 after them.
function sealed(bytes) {
  const end = new DataView(new ArrayBuffer(CRC));
  end.setUint32(0, crc32(bytes), true);
  return joined([bytes, new Uint8Array(end.buffer)]);
}

// SHA-256; crypto.subtle is missing where a page comes from a plain http server.
function sha256(bytes) {
  const fraction = (x) => Math.floor((x - Math.floor(x)) * 2 ** 32) | 0;
  const primes = [];
  for (let n = 2; primes.length < 64; n++) if (primes.every((p) => n % p)) primes.push(n);
  const K = primes.map((p) => fraction(Math.cbrt(p))), hash = primes.slice(0, 8).map((p) => fraction(Math.sqrt(p)));
  const padded = new Uint8Array(((bytes.length + 72) >> 6) << 6), view = new DataView(padded.buffer);
  padded.set(bytes);
  padded[bytes.length] = 0x80;
  view.setBigUint64(padded.length - 8, 8n * BigInt(bytes.length));
  const turn = (x, n) => (x >>> n) | (x << (32 - n)), W = new Int32Array(64);
  for (let at = 0; at < padded.length; at += 64) {
    for (let i = 0; i < 64; i++) {
      if (i < 16) {
        W[i] = view.getInt32(at + 4 * i);
        continue;
      }
      const a = W[i - 15], b = W[i - 2];
      W[i] = W[i - 16] + W[i - 7] + (turn(a, 7) ^ turn(a, 18) ^ (a >>> 3)) + (turn(b, 17) ^ turn(b, 19) ^ (b >>> 10));
    }
    let [a, b, c, d, e, f, g, h] = hash;
    for (let i = 0; i < 64; i++) {
      const one = (h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + K[i] + W[i]) | 0;
      const two = ((turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [a, b, c, d, e, f, g, h] = [(one + two) | 0, a, b, c, (d + one) | 0, e, f, g];
    }
    [a, b, c, d, e, f, g, h].forEach((word, i) => { hash[i] = (hash[i] + word) | 0; });
  }
  const out = new DataView(new ArrayBuffer(HASH));
  hash.forEach((word, i) => out.setInt32(4 * i, word));
  return new Uint8Array(out.buffer);
}

// rANS with one state: what codes bytes of these frequencies and cumulative starts.
function encoded(starts, freqs) {
  let x = LOW;
  const words = [];
  for (let i = freqs.length - 1; i >= 0; i--) {
    const f = BigInt(freqs[i]);
    if (x >= f << ROOM) {
      words.push(Number(x & WORD));
      x >>= 32n;
    }
    x = ((x / f) << TOTAL_BITS) + (x % f) + BigInt(starts[i]);
  }
  const out = new DataView(new ArrayBuffer(8 + 4 * words.length));
  out.setBigUint64(0, x, true);
  words.reverse().forEach((word, i) => out.setUint32(8 + 4 * i, word, true));
  return new Uint8Array(out.buffer);
}

class Codec {
  // `rest` is awaited between steps, with the bytes done: it lets the page live, and may throw.
  constructor(engine, rest) {
    const { window } = engine.facts;
    Object.assign(this, { engine, rest, window, block: window * Math.max(1, Math.floor(CODED_BLOCK / window)) });
    this.names = fromHex(engine.facts.names); // of the model and of its arithmetic, 16 bytes each
  }

  header(length) {
    const bytes = new Uint8Array(HEADER), view = new DataView(bytes.buffer);
    bytes.set([...MAGIC, VERSION, 0, NATIVE, Number(TOTAL_BITS)]);
    [1, this.window, this.block].forEach((value, i) => view.setUint32(12 + 4 * i, value, true));
    view.setBigUint64(24, BigInt(length), true);
    bytes.set(this.names, 32);
    return sealed(bytes);
  }

  async compress(data) {
    const parts = [this.header(data.length)];
    for (let start = 0; start < data.length; start += this.block) {
      const bytes = data.subarray(start, start + this.block);
      let payload = await this.payload(bytes, start), states = 1;
      if (payload.length >= bytes.length) [payload, states] = [bytes, 0];
      const head = new DataView(new ArrayBuffer(BLOCK_HEAD)), words = states ? (payload.length - 8) / 4 : 0;
      [bytes.length, states, words].forEach((value, i) => head.setUint32(4 * i, value, true));
      parts.push(sealed(joined([new Uint8Array(head.buffer), payload])));
    }
    return joined([...parts, sha256(data)]);
  }

  async payload(bytes, done) {
    const { engine, window } = this, { piece } = engine.facts;
    const starts = new Uint32Array(bytes.length), freqs = new Uint32Array(bytes.length);
    for (let first = 0; first < bytes.length; first += window) {
      const own = bytes.subarray(first, first + window), ids = [FIRST, ...own.subarray(0, -1)];
      engine.clear();
      for (let i = 0; i < ids.length; i += piece) {
        const fed = ids.slice(i, i + piece), counts = engine.counts(fed);
        fed.forEach((_, j) => {
          const at = first + i + j, row = j * BYTES;
          for (let v = 0; v < bytes[at]; v++) starts[at] += counts[row + v];
          freqs[at] = counts[row + bytes[at]];
        });
        await this.rest(done + first + i);
      }
    }
    return encoded(starts, freqs);
  }

  async decompress(file) {
    const view = new DataView(file.buffer, file.byteOffset, file.length), length = this.check(file, view);
    const out = new Uint8Array(length);
    let at = HEADER + CRC;
    for (let start = 0; start < length; start += this.block) {
      const size = Math.min(this.block, length - start), left = file.length - HASH - CRC - at;
      const [n, states, words] = left < BLOCK_HEAD ? [] : [0, 4, 8].map((i) => view.getUint32(at + i, true));
      const paid = states ? 8 + 4 * words : size, stop = at + BLOCK_HEAD + paid;
      if (n !== size || states > 1 || (!states && words) || BLOCK_HEAD + paid > left) throw new Error("the file is damaged or cut off");
      if (crc32(file.subarray(at, stop)) !== view.getUint32(stop, true)) throw new Error("the file is damaged: a checksum is wrong");
      if (states) await this.restore(view, at + BLOCK_HEAD, words, out.subarray(start, start + size), start);
      else out.set(file.subarray(at + BLOCK_HEAD, stop), start);
      at = stop + CRC;
    }
    if (at !== file.length - HASH) throw new Error("the file is longer than it says");
    if (sha256(out).some((byte, i) => byte !== file[at + i])) throw new Error("the file is damaged: the result is not the original");
    return out;
  }

  // The length of the original; throws unless this model made the file, one window at a time.
  check(file, view) {
    if (!isCoded(file) || file.length < HEADER + CRC + HASH) throw new Error("this is not a file compressed by bitbyte, or it is cut off");
    if (view.getUint16(8, true) !== VERSION) throw new Error("this file has contexts mixed in: bitbyte decompress restores it");
    if (crc32(file.subarray(0, HEADER)) !== view.getUint32(HEADER, true)) throw new Error("the file's header is damaged");
    if (this.names.some((byte, i) => byte !== file[32 + i])) throw new Error("this file was compressed with another model");
    const length = Number(view.getBigUint64(24, true));
    if (view.getUint32(12, true) !== 1) throw new Error("this file has several windows side by side: bitbyte decompress restores it");
    const wanted = this.header(length);
    if (wanted.some((byte, i) => byte !== file[i])) throw new Error("the file's header holds values that bitbyte does not write here");
    const least = Math.ceil(length / this.block) * (BLOCK_HEAD + 1 + CRC);
    if (file.length < HEADER + CRC + HASH + least) throw new Error("the file is cut off");
    return length;
  }

  // Decode one block into `out`; its coder words begin 8 bytes after `at`.
  async restore(view, at, words, out, done) {
    const { engine, window } = this;
    let x = view.getBigUint64(at, true), next = at + 8;
    const stop = next + 4 * words;
    if (x < LOW) throw new Error("the file is damaged: a coder state is out of range");
    for (let i = 0; i < out.length; i++) {
      const place = i % window;
      if (!place) engine.clear();
      const counts = engine.counts([place ? out[i - 1] : FIRST]), slot = Number(x & SLOT);
      let value = 0, start = 0;
      while (start + counts[value] <= slot) start += counts[value++];
      x = BigInt(counts[value]) * (x >> TOTAL_BITS) + BigInt(slot - start);
      if (x < LOW) {
        if (next === stop) throw new Error("the file is damaged: its coder words end too early");
        x = (x << 32n) | BigInt(view.getUint32(next, true));
        next += 4;
      }
      out[i] = value;
      await this.rest(done + i);
    }
    if (next !== stop || x !== LOW) throw new Error("the file is damaged: its coder words do not end where its bytes do");
  }
}
