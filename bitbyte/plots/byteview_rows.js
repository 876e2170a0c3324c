// The rows of a ByteView: line breaks, tint, drawing, the map of the whole.
// Only the rows in sight are in the document, so an update costs the same at 1 kB and at 1 MB.
// Bytes become text nodes, never HTML.

const ROW = 20, SPARE = 6; // px of a row, rows around the sight
const WARM = "213,94,0", COLD = "0,114,178"; // Okabe-Ito vermillion and blue: above, below zero
const LEVELS = 24;
const TINTS = Array.from({ length: 2 * LEVELS + 1 }, (_, k) =>
  k === LEVELS ? "" : `rgba(${k < LEVELS ? COLD : WARM},${(0.75 * Math.abs(k - LEVELS) / LEVELS).toFixed(3)})`);

function make(tag, className, text, parent) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

class Rows { // View (byteview.js) adds messages, mouse, keys and the tip
  constructor(model) {
    this.model = model;
    this.bytes = new Bytes();
    this.rows = [0]; // first byte of each row
    this.columns = 0; // 0: not laid out yet
    this.drawn = new Map(); // row -> element
    this.scale = { low: 0, high: 1 };
    this.following = true; // new bytes are kept in sight
    this.placed = 0; // scrollTop where we put it
    this.dirty = Infinity; // bytes from here on are not laid out yet
    this.grown = false; // since the last frame
  }

  changed(from) { // many changes in a frame are one
    if (from === 0) this.sums = undefined;
    this.dirty = Math.min(this.dirty, from);
    this.plan();
  }

  place(i) { // what people are told: counted from the start of what the bytes were cut from
    return (this.model.get("start") || 0) + i;
  }

  gutter() { // columns of the offset: room for eight digits, and for a view that starts far away
    return Math.max(9, String(this.place(0)).length + 2);
  }

  // --- tint

  rescale(always) {
    const { bytes, model, scale } = this, wanted = model.get("layer");
    const name = bytes.names.includes(wanted) || wanted === "none" ? wanted : bytes.names[0];
    if (!this.sums || this.sums.name !== name) this.sums = newSums(name); // name is undefined without layers
    addUp(this.sums, bytes.layers[name], bytes.n);
    let [low, high] = scaleOf(this.sums);
    low = model.get("low") ?? low;
    high = model.get("high") ?? high;
    if (!(high > low)) high = low + 1;
    const moved = Math.abs(low - scale.low) + Math.abs(high - scale.high);
    if (always || scale.name !== name || moved > 0.05 * (scale.high - scale.low)) { // else it would flicker
      this.scale = { name, low, high };
      this.redress();
    }
    this.drawBar();
  }

  level(i) { // -LEVELS to LEVELS
    const { name, low, high } = this.scale, value = this.bytes.layers[name]?.[i];
    if (!Number.isFinite(value) || this.bytes.flags[i] & (GIVEN | MASKED)) return 0;
    const share = low < 0 && high > 0 ? value / (value > 0 ? high : -low) : (value - low) / (high - low);
    return Math.round(LEVELS * Math.max(low < 0 && high > 0 ? -1 : 0, Math.min(1, share)));
  }

  unit(name) {
    return this.model.get("units")?.[name] ?? (UNITLESS.includes(name) ? "" : "bits");
  }

  drawBar() {
    const { model, bar } = this, { names } = this.bytes, { name, low, high } = this.scale;
    const key = JSON.stringify([names, name, low, high, model.get("controls"), model.get("units")]);
    if (key === this.barKey) return this.drawCount();
    this.barKey = key;
    bar.replaceChildren();
    this.boxes = {};
    if (model.get("controls")) {
      if (names.length) {
        const list = make("select", "", "", make("label", "", "tint ", bar));
        for (const option of [...names, "none"]) make("option", "", option, list);
        list.value = name || "none";
        list.addEventListener("change", () => this.save("layer", list.value));
      }
      for (const trait of ["hex", "wrap"]) {
        const line = make("label", "", "", bar), box = make("input", "", "", line);
        box.type = "checkbox";
        line.append(trait);
        box.addEventListener("change", () => this.save(trait, box.checked));
        this.boxes[trait] = box;
      }
    }
    if (names.includes(name)) {
      const legend = make("span", "", `${model.get("controls") ? "" : name} ${short(low)}`, bar);
      const from = low < 0 && high > 0 ? `${TINTS[0]}, transparent` : "transparent";
      make("span", "bv-shades", "", legend).style.background = `linear-gradient(90deg, ${from}, ${TINTS[2 * LEVELS]})`;
      legend.append(`${short(high)} ${this.unit(name)}`);
    }
    this.count = make("span", "bv-faint bv-count", "", bar);
    this.drawCount();
  }

  drawCount() {
    const [start, stop] = this.model.get("selection"), n = this.bytes.n.toLocaleString("en");
    const words = `${this.place(start)}:${this.place(stop)} of ${n} bytes selected`;
    this.count.textContent = stop > start ? words : `${n} bytes`;
    for (const [trait, box] of Object.entries(this.boxes)) box.checked = this.model.get(trait);
  }

  // --- rows

  renumber() { // the offsets
    this.columns = 0;
    this.forget(0);
    this.resized();
  }

  resized() {
    this.scroll.style.height = `${this.model.get("height")}px`;
    if (!this.scroll.clientWidth) return; // out of sight
    const probe = make("div", "bv-row", "0".repeat(100), this.paper);
    this.root.style.setProperty("--gutter", `${this.gutter()}ch`);
    const width = probe.getBoundingClientRect().width / (100 + this.gutter());
    probe.remove();
    this.root.classList.toggle("bv-narrow", this.scroll.clientWidth < 600);
    const columns = Math.max(8, Math.floor((this.scroll.clientWidth - 4) / width) - this.gutter());
    if (columns !== this.columns) {
      this.columns = columns;
      this.relayout(0, true);
    }
    this.plan();
  }

  rowOf(i) { // the last row that starts at or before byte i
    let low = 0, high = this.rows.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.rows[middle] <= i) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  end(row) { // one past its last byte
    return this.rows[row + 1] ?? this.bytes.n;
  }

  relayout(from, keepPlace) { // break lines anew from byte `from` on
    if (!this.columns) return;
    const { model, rows, scroll } = this, seen = keepPlace && rows[Math.round(scroll.scrollTop / ROW)];
    const row = Math.max(0, this.rowOf(from) - 1), end = rows[row + 1]; // its last word may fit now
    this.bytes.breakLines(rows, row, this.columns, model.get("hex"), model.get("wrap"));
    this.forget(!keepPlace && end <= from && rows[row + 1] === end ? row + 1 : row);
    this.paper.style.height = `${rows.length * ROW}px`;
    if (seen) this.jump(this.rowOf(seen) * ROW);
    this.drawCount();
    this.plan();
  }

  forget(first) { // rows from there on are drawn anew
    for (const [row, element] of this.drawn) {
      if (row < first) continue;
      element.remove();
      this.drawn.delete(row);
    }
  }

  plan() { // draws once a frame
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = undefined;
    const { scroll, rows, drawn } = this;
    if (!this.columns) return;
    if (this.dirty < Infinity) this.settle();
    this.drawMap();
    const first = Math.max(0, Math.floor(scroll.scrollTop / ROW) - SPARE);
    const stop = Math.min(rows.length, Math.ceil((scroll.scrollTop + scroll.clientHeight) / ROW) + SPARE);
    this.forget(stop);
    for (const [row, element] of drawn) {
      if (row >= first) continue;
      element.remove();
      drawn.delete(row);
    }
    for (let row = first; row < stop; row++) {
      if (drawn.has(row)) continue;
      const element = make("div", "bv-row");
      element.style.top = `${row * ROW}px`;
      element.dataset.offset = this.place(rows[row]);
      for (let i = rows[row]; i < this.end(row); i++) this.dress(make("span", "", this.glyph(i), element), i);
      drawn.set(row, element);
      this.paper.append(element);
    }
    this.placeTip();
  }

  settle() { // what changed since the last frame
    const from = this.dirty;
    this.dirty = Infinity;
    this.rescale(false);
    this.relayout(this.bytes.classify(from), false);
    if (this.grown && this.following) this.jump(this.rows.length * ROW);
    this.grown = false;
    this.showTip(this.hover);
  }

  glyph(i) {
    const { bytes } = this, byte = bytes.data[i], kind = bytes.kinds[i];
    if (bytes.flags[i] & MASKED || (kind === CONTINUED && !this.model.get("hex"))) return "";
    if (this.model.get("hex") || kind === LONE) return hex2(byte);
    if (kind === 1) return byte === 0x20 ? " " : label(byte);
    return bytes.character(i).replace(/^\p{M}/u, "\u25cc$&"); // an accent needs a letter below it
  }

  dress(cell, i) {
    const { bytes, model } = this, flags = bytes.flags[i], byte = bytes.data[i], kind = bytes.kinds[i];
    const hex = model.get("hex"), [start, stop] = model.get("selection");
    const names = ["bv-b", `bv-w${hex ? 12 : bytes.width(i)}`];
    if (!hex && kind === LONE) names.push("bv-lone");
    if (!hex && kind === 1 && (byte < 0x20 || byte === 0x7f)) names.push("bv-dim");
    for (const [flag, name] of FLAGS) if (flags & flag) names.push(`bv-${name}`);
    if (i >= start && i < stop) names.push("bv-on");
    if (i === model.get("cursor")) names.push("bv-cursor");
    cell.className = names.join(" ");
    cell.style.backgroundColor = TINTS[LEVELS + this.level(i)];
    cell.position = i;
  }

  redress() { // the text stays, the looks change
    for (const row of this.drawn.values()) for (const cell of row.children) this.dress(cell, cell.position);
    this.drawCount();
    this.plan();
  }

  cellOf(i) {
    const row = this.rowOf(i);
    return this.drawn.get(row)?.children[i - this.rows[row]];
  }

  drawMap() { // a line of pixels for a row, or for several; the part in sight is framed
    const { map, rows, scroll } = this, height = scroll.clientHeight, lines = Math.min(height, rows.length);
    map.hidden = rows.length * ROW <= height;
    if (map.hidden) return;
    map.width = 14;
    map.height = height;
    const pen = map.getContext("2d"), share = height / (rows.length * ROW);
    for (let y = 0; y < lines; y++) {
      const row = Math.floor(y * rows.length / lines), stop = this.end(row);
      const step = Math.max(1, Math.floor((stop - rows[row]) / 12));
      let sum = 0, count = 0;
      for (let i = rows[row]; i < stop; i += step, count++) sum += this.level(i);
      pen.fillStyle = TINTS[LEVELS + Math.max(-LEVELS, Math.min(LEVELS, Math.round(1.5 * sum / count)))] || "transparent";
      pen.fillRect(0, y * height / lines, 14, Math.ceil(height / lines));
    }
    pen.strokeStyle = getComputedStyle(scroll).color;
    pen.strokeRect(0.5, scroll.scrollTop * share + 0.5, 13, Math.max(6, height * share) - 1);
  }

  jump(top) { // scrolling that is not the reader's
    this.scroll.scrollTop = top;
    this.placed = this.scroll.scrollTop;
    this.plan();
  }

  scrolled() {
    const { scroll } = this;
    if (Math.abs(scroll.scrollTop - this.placed) > 1) {
      this.following = scroll.scrollTop + scroll.clientHeight > (this.rows.length - 1) * ROW;
      this.placed = -9;
    }
    this.plan();
  }

  reveal(i) {
    const { scroll } = this, top = this.rowOf(i) * ROW, least = top + ROW - scroll.clientHeight;
    scroll.scrollTop = Math.max(least, Math.min(top, scroll.scrollTop));
    this.draw();
  }
}
