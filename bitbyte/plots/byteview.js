// ByteView: bytes as text or hex, tinted by a layer of numbers, with the expected bytes in a tip.
//
// byteview.py describes the messages, byteview_bytes.js holds the data, byteview_rows.js draws it,
// byteview.css has the looks; byteview_page.py puts all of it into a page.

class View extends Rows {
  constructor(model, el) {
    super(model);
    this.serial = -1; // of the last message; -1: nothing yet
    this.hover = false; // the tip is there, and follows the mouse
    this.pinned = false; // the tip stays, its bytes can be picked
    this.picked = -1; // by arrow keys, in the tip
    this.pressedAt = -1; // byte under a pressed button
    this.mark = -1; // where a selection begins
    this.build(el);
    this.watch = {
      "msg:custom": (message, buffers) => this.receive(message, buffers || []),
      "change:layer": () => this.rescale(true),
      "change:low": () => this.rescale(true),
      "change:high": () => this.rescale(true),
      "change:hex": () => this.relayout(0, true),
      "change:wrap": () => this.relayout(0, true),
      "change:start": () => this.renumber(),
      "change:locked": () => {
        this.picked = -1;
        this.showTip(this.hover);
      },
      "change:cursor": () => this.cursorMoved(),
      "change:selection": () => this.redress(),
      "change:controls": () => this.drawBar(),
      "change:height": () => this.resized(),
    };
    for (const [event, act] of Object.entries(this.watch)) model.on(event, act);
    this.observer = new ResizeObserver(() => this.resized());
    this.observer.observe(this.scroll);
    this.follow = () => this.placeTip(); // the notebook scrolls as well
    document.addEventListener("scroll", this.follow, true);
    this.hello();
  }

  close() {
    for (const [event, act] of Object.entries(this.watch)) this.model.off(event, act);
    this.observer.disconnect();
    document.removeEventListener("scroll", this.follow, true);
    this.tip.remove();
  }

  build(el) {
    const root = make("div", "bv", "", el);
    this.root = root;
    this.bar = make("div", "bv-bar", "", root);
    const body = make("div", "bv-body", "", root), scroll = make("div", "bv-scroll", "", body);
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "application");
    scroll.setAttribute("aria-label", "bytes: arrow keys move, with Shift they select, Enter lists what was expected");
    this.scroll = scroll;
    this.paper = make("div", "", "", scroll);
    this.map = make("canvas", "bv-map", "", body);
    this.tip = make("div", "bv-tip", "", document.body); // out here no cell clips it
    this.tip.setAttribute("role", "status");
    this.tip.hidden = true;
    this.drawBar();
    scroll.addEventListener("scroll", () => this.scrolled());
    scroll.addEventListener("pointerdown", (event) => this.pressed(event));
    scroll.addEventListener("pointermove", (event) => this.moved(event));
    scroll.addEventListener("pointerup", (event) => this.released(event));
    scroll.addEventListener("pointercancel", () => { this.pressedAt = -1; });
    scroll.addEventListener("pointerleave", () => {
      if (this.pinned) this.hover = false; // a list made anew would lose the mouse that comes to it
      else this.showTip(false);
    });
    scroll.addEventListener("keydown", (event) => this.key(event));
    scroll.addEventListener("blur", () => this.unpin(false));
    scroll.addEventListener("copy", (event) => this.copy(event));
    this.map.addEventListener("pointerdown", (event) => {
      const row = event.offsetY / this.map.clientHeight * this.rows.length;
      scroll.scrollTop = row * ROW - scroll.clientHeight / 2;
    });
    this.tip.addEventListener("pointerdown", (event) => {
      event.preventDefault(); // the focus stays in the text
      const line = event.target.closest(".bv-free");
      if (this.pinned && line) this.choose(Number(line.dataset.byte));
    });
    this.tip.addEventListener("pointermove", (event) => { // Enter takes the row under the mouse
      const line = event.target.closest(".bv-free");
      if (this.pinned && line) this.pick([...this.tip.querySelectorAll(".bv-free")].indexOf(line));
    });
  }

  // --- what Python says

  hello() {
    this.waiting = true;
    this.model.send({ op: "hello" });
  }

  receive(message, buffers) {
    const { op, serial } = message, { bytes } = this;
    if (op === "all") {
      this.waiting = false;
      if (serial === this.serial) return; // another view asked for it
      this.serial = serial;
      this.bytes = new Bytes();
      this.bytes.write(message, buffers, (i) => i, buffers[0].byteLength);
      this.unpin(false);
      if (this.bytes.n !== bytes.n) {
        this.following = true;
        this.jump(0);
      }
      this.changed(0);
      return;
    }
    if (this.waiting || serial <= this.serial) return; // what comes for hello has it in it
    if (serial !== this.serial + 1) return this.hello();
    this.serial = serial;
    if (op === "append") {
      bytes.write(message, buffers, (i) => message.start + i, message.start + buffers[0].byteLength);
      this.grown = true;
      this.changed(message.start);
    } else if (op === "paint") {
      const places = new Uint32Array(whole(buffers[5]).buffer);
      bytes.write(message, buffers, (i) => places[i], bytes.n);
      this.sums = undefined;
      this.changed(places.reduce((a, b) => Math.min(a, b)));
    } else if (op === "truncate") {
      bytes.n = message.n;
      this.sums = undefined;
      this.changed(message.n);
    } else if (op === "flags") {
      bytes.flags.set(whole(buffers[0]));
      this.changed(0);
    }
  }

  // --- mouse and keys

  choices() { // [{byte, share}] that can be picked at the cursor
    return this.model.get("locked") ? [] : this.bytes.expected(this.model.get("cursor"));
  }

  pick(j) { // row j of the tip is the one that Enter takes; -1: none
    this.picked = j;
    this.tip.querySelectorAll(".bv-free").forEach((line, at) => line.classList.toggle("bv-picked", at === j));
  }

  save(name, value) { // views see it at once, Python 25 times a second
    this.model.set(name, value);
    this.timer ??= setTimeout(() => {
      this.timer = undefined;
      this.model.save_changes();
    }, 40);
  }

  under(event) { // the byte there, or -1
    const cell = document.elementFromPoint(event.clientX, event.clientY)?.closest(".bv-b");
    return cell && this.scroll.contains(cell) ? cell.position : -1;
  }

  pressed(event) {
    const i = this.under(event);
    if (event.button !== 0 || i < 0) return;
    this.scroll.focus({ preventScroll: true });
    this.scroll.setPointerCapture(event.pointerId);
    this.pressedAt = i;
    this.dragged = event.shiftKey;
    if (!event.shiftKey || this.mark < 0) this.mark = i;
    if (event.shiftKey) this.select(i);
  }

  moved(event) {
    const i = this.under(event);
    if (this.pressedAt < 0) {
      if (this.pinned) return;
      if (i < 0) this.showTip(false);
      else this.moveTo(i);
      return;
    }
    const box = this.scroll.getBoundingClientRect();
    if (event.clientY < box.top) this.scroll.scrollTop -= ROW;
    if (event.clientY > box.bottom) this.scroll.scrollTop += ROW;
    if (i < 0 || (i === this.pressedAt && !this.dragged)) return;
    this.dragged = true;
    this.unpin(false);
    this.select(i);
  }

  released() {
    const i = this.pressedAt;
    this.pressedAt = -1;
    if (i < 0 || this.dragged) return;
    this.clearSelection();
    this.picked = -1;
    this.pinned = !(this.pinned && i === this.model.get("cursor")); // a second click lets go
    this.moveTo(i);
  }

  select(i) { // from the mark to byte i, both with their whole characters
    const { bytes } = this, start = Math.min(this.mark, i);
    let stop = Math.max(this.mark, i) + 1;
    if (this.model.get("hex")) return this.save("selection", [start, stop]);
    while (stop < bytes.n && bytes.kinds[stop] === CONTINUED) stop++;
    this.save("selection", [bytes.first(start), stop]);
  }

  clearSelection() {
    if (this.model.get("selection")[1]) this.save("selection", [0, 0]);
  }

  moveTo(i) {
    this.own = true; // nothing scrolls under the mouse
    if (i !== this.model.get("cursor")) this.save("cursor", i);
    this.own = false;
    this.showTip(true);
  }

  cursorMoved() {
    const i = this.model.get("cursor"), old = this.cursor;
    this.cursor = i;
    if (!this.own && i >= 0 && i < this.bytes.n) this.reveal(i);
    for (const at of [old, i]) {
      const cell = at >= 0 && this.cellOf(at);
      if (cell) this.dress(cell, at);
    }
  }

  key(event) {
    const { model, picked } = this, { key } = event, at = model.get("cursor");
    const choices = this.choices(), count = choices.length;
    const plain = !event.ctrlKey && !event.metaKey && !event.altKey, copies = !plain && key === "c";
    if (copies || (plain && key.length === 1)) event.stopPropagation(); // "dd" would delete the cell
    if (event.altKey || event.metaKey) return;
    if (this.pinned && key === "Escape") this.unpin(true);
    else if (this.pinned && count && (key === "ArrowDown" || key === "ArrowUp")) {
      this.pick((picked < 0 ? (key === "ArrowDown" ? 0 : count - 1) : picked + (key === "ArrowDown" ? 1 : count - 1)) % count);
    } else if (key === "Enter" && !event.shiftKey && !event.ctrlKey && at >= 0) {
      if (this.pinned && picked >= 0 && picked < count) this.choose(choices[picked].byte);
      else {
        this.pinned = !this.pinned;
        this.picked = this.pinned && count ? 0 : -1;
        this.showTip(true);
      }
    } else if (!this.travel(event, Math.max(0, at))) return;
    event.preventDefault();
    event.stopPropagation();
  }

  travel({ key, shiftKey, ctrlKey }, at) { // false: not our key
    const row = this.rowOf(at), page = Math.max(1, Math.floor(this.scroll.clientHeight / ROW) - 1);
    const rows = { ArrowUp: -1, ArrowDown: 1, PageUp: -page, PageDown: page };
    const { bytes } = this, last = bytes.n - 1;
    let to;
    if (key === "ArrowLeft") to = at - 1;
    else if (key === "ArrowRight") to = this.model.get("cursor") + 1;
    else if (key === "Home") to = ctrlKey ? 0 : this.rows[row];
    else if (key === "End") to = ctrlKey ? last : this.end(row) - 1;
    else if (key in rows) {
      const other = Math.max(0, Math.min(this.rows.length - 1, row + rows[key]));
      to = Math.min(this.end(other) - 1, this.rows[other] + at - this.rows[row]);
    } else return false;
    to = Math.max(0, Math.min(last, to));
    if (!bytes.n) return true;
    if (!shiftKey) {
      this.clearSelection();
      this.mark = -1;
    } else {
      if (this.mark < 0) this.mark = at;
      this.select(to);
    }
    this.unpin(false);
    this.moveTo(to);
    this.reveal(to);
    return true;
  }

  copy(event) {
    const part = this.bytes.data.slice(...this.model.get("selection"));
    if (!part.length) return;
    const text = this.model.get("hex") ? [...part].map(hex2).join(" ") : new TextDecoder().decode(part);
    event.clipboardData.setData("text/plain", text);
    event.preventDefault();
  }

  choose(byte) {
    if (this.model.get("locked")) return; // since the list was drawn
    const [, , count = 0] = this.model.get("choice");
    this.unpin(false);
    this.save("choice", [this.model.get("cursor"), byte, count + 1]);
  }

  // --- tip

  unpin(visible) {
    this.pinned = false;
    this.picked = -1;
    this.showTip(visible);
  }

  showTip(visible) {
    const { bytes, model, tip } = this, i = model.get("cursor");
    this.hover = visible;
    tip.hidden = !(visible || this.pinned) || i < 0 || i >= bytes.n;
    if (tip.hidden) return;
    const byte = bytes.data[i], masked = bytes.flags[i] & MASKED, first = bytes.first(i), free = this.choices().length;
    tip.classList.toggle("bv-pinned", this.pinned);
    tip.replaceChildren();
    const head = make("div", "", `byte ${this.place(i).toLocaleString("en")}: `, tip);
    if (!masked) {
      make("code", "", `0x${hex2(byte)} `, head);
      const text = byte < 0x80 ? label(byte) : bytes.kinds[first] === LONE ? "" : bytes.character(first);
      make("strong", "", text, head);
      if (byte >= 0x80 && text) {
        const point = text.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
        head.append(` U+${point}, byte ${i - first + 1} of ${bytes.kinds[first]}`);
      } else if (!text) make("span", "bv-faint", "no character by itself", head);
    }
    const words = FLAGS.filter(([flag]) => bytes.flags[i] & flag).map(([, word]) => (word === "start" ? "patch start" : word));
    if (words.length) make("div", "bv-faint", words.join(", "), tip);
    const table = make("table", "", "", tip);
    for (const name of bytes.names) {
      const value = bytes.layers[name][i], unit = this.unit(name);
      if (!Number.isFinite(value)) continue;
      const line = make("tr", "", "", table);
      make("td", "", name, line);
      make("td", "", `${unit === "bits" ? value.toFixed(2) : +value.toPrecision(4)} ${unit}`, line);
    }
    bytes.expected(i).forEach(({ byte: other, share }, j) => {
      const line = make("div", "bv-top", "", tip), percent = 100 * share;
      if (free) line.classList.add("bv-free");
      if (j === this.picked) line.classList.add("bv-picked");
      if (other === byte && !masked) line.classList.add("bv-true");
      line.dataset.byte = other;
      make("code", "", label(other), line);
      make("code", "bv-faint", hex2(other), line);
      make("i", "", "", make("span", "", "", line)).style.width = `${percent}%`;
      const words = percent >= 9.95 ? percent.toFixed(0) : percent < 0.095 ? "<0.1" : +percent.toPrecision(2);
      make("span", "", `${words} %`, line);
    });
    if (this.pinned && free) make("div", "bv-faint", "click, or arrows and Enter, to choose; Esc closes", tip);
    this.placeTip();
  }

  placeTip() { // below the byte, or above it where there is no room
    const i = this.model.get("cursor"), cell = !this.tip.hidden && this.cellOf(i);
    if (!cell) return;
    const at = cell.getBoundingClientRect(), tip = this.tip.getBoundingClientRect();
    const top = at.bottom + 6 + tip.height < window.innerHeight ? at.bottom + 6 : at.top - 6 - tip.height;
    this.tip.style.left = `${Math.max(4, Math.min(at.left, window.innerWidth - tip.width - 8))}px`;
    this.tip.style.top = `${Math.max(4, top)}px`;
  }
}

export default {
  render({ model, el }) {
    const view = new View(model, el);
    return () => view.close();
  },
};

function openPage() { // the same view on data that stands in the page
  const { state, message, buffers } = JSON.parse(document.getElementById("bitbyte-data").textContent);
  const columns = buffers.map((text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer));
  const heard = {};
  const fire = (event, ...facts) => heard[event]?.(...facts);
  const model = {
    get: (name) => state[name],
    set: (name, value) => {
      state[name] = value;
      fire(`change:${name}`);
    },
    on: (event, act) => { heard[event] = act; },
    save_changes: () => {},
    send: () => fire("msg:custom", message, columns),
  };
  new View(model, document.getElementById("bitbyte-view"));
}
