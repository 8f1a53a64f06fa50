"use strict";
// Draws the runs of each module on canvases, some rows on each, and only when they come into view.
(() => {
  const PAGE = 4096;
  const LABEL = 84; // pixels, as all that follows
  const GAP = 6;
  const STRIP = 10;
  const ROW = 14;
  const NARROWEST = 180;
  const MOST_COLUMNS = 8;
  const ROWS = 64; // on one canvas: browsers limit its height
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const spoken = document.getElementById("spoken");
  const executed = data.states.map(([, ...phases]) => phases.length > 0);
  const chosen = new Set(); // kinds; empty: all

  const hex = (number) => "0x" + number.toString(16);
  const count = (number) => number.toLocaleString("en");

  // Index of the last element that is not greater than the value; -1 if there is none.
  function lastUpTo(values, value) {
    let low = 0;
    let high = values.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] <= value) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }

  class Text {
    constructor({ name, texts, functions }) {
      this.name = name;
      this.pages = [];
      this.starts = [];
      this.ends = [];
      this.states = [];
      for (const [first, ...runs] of texts) {
        let offset = first;
        for (let index = 0; index < runs.length; index += 2) {
          this.starts.push(offset);
          offset += runs[index];
          this.ends.push(offset);
          this.states.push(runs[index + 1]);
        }
        for (let page = first; page < offset; page += PAGE) this.pages.push(page);
      }
      this.functions = [];
      this.functionStarts = [];
      let end = 0;
      for (let index = 0; index < functions.length; index += 3) {
        const start = end + functions[index];
        end = start + functions[index + 1];
        this.functions.push({ start, end, name: functions[index + 2] });
        this.functionStarts.push(start);
      }
    }

    // Calls back with start, end and state of each run in [start, end), cut to it.
    eachRun(start, end, callback) {
      for (let run = Math.max(0, lastUpTo(this.starts, start)); run < this.starts.length; run++) {
        if (this.starts[run] >= end) break;
        const from = Math.max(start, this.starts[run]);
        const to = Math.min(end, this.ends[run]);
        if (from < to) callback(from, to, this.states[run]);
      }
    }

    functionAt(offset) {
      const found = this.functions[lastUpTo(this.functionStarts, offset)];
      return found && offset < found.end ? found : null;
    }

    // "wanted 34, never executed 120 bytes": what of [start, end) was executed in which phase, and what was not.
    sums(start, end) {
      const phases = data.phases.map(() => 0);
      const rest = new Map();
      this.eachRun(start, end, (from, to, state) => {
        const [kind, ...among] = data.states[state];
        for (const phase of among) phases[phase] += to - from;
        if (!among.length) rest.set(kind, (rest.get(kind) || 0) + to - from);
      });
      const parts = data.phases.map((name, phase) => [name, phases[phase]]);
      for (const [kind, size] of rest) parts.push([data.kinds[kind], size]);
      return parts.filter(([, size]) => size).map(([name, size]) => `${name} ${count(size)}`).join(", ") + " bytes";
    }

    describe(offset) {
      const run = lastUpTo(this.starts, offset);
      const [kind, ...phases] = data.states[this.states[run]];
      const size = this.ends[run] - this.starts[run];
      const what = phases.length ? "executed in " + phases.map((phase) => data.phases[phase]).join(", ") : data.kinds[kind];
      const found = this.functionAt(offset);
      const page = Math.floor(offset / PAGE) * PAGE;
      const lines = [
        found ? found.name : "in no known function",
        `${this.name}+${hex(this.starts[run])}, ${count(size)} bytes: ${what}`,
      ];
      if (found) {
        const extent = `${this.name}+${hex(found.start)}, ${count(found.end - found.start)} bytes`;
        lines.push(`function: ${extent}: ${this.sums(found.start, found.end)}`);
      }
      lines.push(`page ${hex(page)}: ${this.sums(page, page + PAGE)}`);
      return lines;
    }
  }

  function hideTip() {
    tip.hidden = true;
  }

  function showTip(lines, x, y) {
    tip.replaceChildren(
      ...lines.map((line) => {
        const element = document.createElement("div");
        element.textContent = line;
        return element;
      }),
    );
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - width - 8)) + "px";
    tip.style.top = (y + 18 + height < innerHeight ? y + 18 : Math.max(4, y - height - 12)) + "px";
  }

  class Drawing {
    constructor(element) {
      this.element = element;
      this.text = new Text(data.modules[element.dataset.module]);
      this.offset = this.text.starts[0];
      this.cursor = document.createElement("div");
      this.cursor.className = "cursor";
      this.cursor.hidden = true;
      this.observer = new IntersectionObserver(
        (entries) => entries.filter((entry) => entry.isIntersecting).forEach(({ target }) => this.draw(target)),
        { rootMargin: "300px" },
      );
      element.addEventListener("pointermove", (event) => this.point(event));
      element.addEventListener("pointerdown", (event) => this.point(event));
      element.addEventListener("pointerleave", hideTip);
      element.addEventListener("keydown", (event) => this.key(event));
      element.addEventListener("blur", () => {
        this.cursor.hidden = true;
        hideTip();
      });
      this.lay();
    }

    // Lays the canvases out for the width there is; nothing is drawn yet.
    lay() {
      const width = this.element.clientWidth;
      this.width = width;
      this.columns = 1;
      const room = width - LABEL + GAP;
      while (this.columns < MOST_COLUMNS && room / (2 * this.columns) >= NARROWEST + GAP) this.columns *= 2;
      this.strip = Math.max(16, Math.floor(room / this.columns) - GAP);
      const rows = Math.ceil(this.text.pages.length / this.columns);
      this.observer.disconnect();
      const canvases = [];
      for (let row = 0; row < rows; row += ROWS) {
        const canvas = document.createElement("canvas");
        const height = Math.min(ROWS, rows - row) * ROW;
        Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
        canvas.dataset.row = row;
        canvases.push(canvas);
      }
      this.element.replaceChildren(...canvases, this.cursor);
      canvases.forEach((canvas) => this.observer.observe(canvas));
    }

    draw(canvas) {
      const scale = devicePixelRatio || 1;
      canvas.width = Math.round(this.width * scale);
      canvas.height = Math.round(parseFloat(canvas.style.height) * scale);
      const context = canvas.getContext("2d");
      context.scale(scale, scale);
      const style = getComputedStyle(document.documentElement);
      const colours = data.colours.map((name) => style.getPropertyValue("--" + name));
      context.font = "10px ui-monospace, monospace";
      context.textBaseline = "middle";
      const first = Number(canvas.dataset.row) * this.columns;
      const rows = Math.round(parseFloat(canvas.style.height) / ROW);
      const pages = this.text.pages.slice(first, first + rows * this.columns);
      pages.forEach((page, index) => {
        const x = LABEL + (index % this.columns) * (this.strip + GAP);
        const y = Math.floor(index / this.columns) * ROW;
        if (index % this.columns === 0) {
          context.globalAlpha = 1;
          context.fillStyle = style.getPropertyValue("--faint");
          context.fillText(hex(page), 0, y + STRIP / 2);
        }
        // What was executed comes last, so that its pixel is not lost under a neighbour's.
        for (const layer of [false, true]) {
          this.text.eachRun(page, page + PAGE, (from, to, state) => {
            if (executed[state] !== layer) return;
            const kind = data.states[state][0];
            context.globalAlpha = chosen.size && !chosen.has(kind) ? 0.12 : 1;
            context.fillStyle = colours[kind];
            const left = ((from - page) / PAGE) * this.strip;
            const width = ((to - from) / PAGE) * this.strip;
            context.fillRect(x + left, y, layer ? Math.max(width, 1) : width, STRIP);
          });
        }
      });
    }

    redraw() {
      // Observing anew reports what is in view, and that is drawn again.
      const canvases = [...this.element.querySelectorAll("canvas")];
      this.observer.disconnect();
      canvases.forEach((canvas) => this.observer.observe(canvas));
    }

    point(event) {
      const box = this.element.getBoundingClientRect();
      const x = event.clientX - box.left - LABEL;
      const y = event.clientY - box.top;
      const column = Math.floor(x / (this.strip + GAP));
      const within = x - column * (this.strip + GAP);
      const page = this.text.pages[Math.floor(y / ROW) * this.columns + column];
      if (x < 0 || column >= this.columns || within >= this.strip || page === undefined) return hideTip();
      let offset = page + Math.floor((within / this.strip) * PAGE);
      // A pixel stands for some bytes: those that were executed are what one points at.
      const pixel = offset + Math.ceil(PAGE / this.strip);
      this.text.eachRun(offset, Math.min(pixel, page + PAGE), (from, _, state) => {
        if (executed[state] && !executed[this.text.states[lastUpTo(this.text.starts, offset)]]) offset = from;
      });
      showTip(this.text.describe(offset), event.clientX, event.clientY);
      return undefined;
    }

    key(event) {
      const offset = this.target(event.key);
      if (event.key === "Escape") hideTip();
      if (offset === null) return;
      event.preventDefault();
      this.offset = offset;
      const page = lastUpTo(this.text.pages, offset);
      const x = LABEL + (page % this.columns) * (this.strip + GAP);
      const y = Math.floor(page / this.columns) * ROW;
      const left = ((offset - this.text.pages[page]) / PAGE) * this.strip;
      const run = lastUpTo(this.text.starts, offset);
      const width = ((this.text.ends[run] - offset) / PAGE) * this.strip;
      Object.assign(this.cursor.style, {
        left: `${x + left - 3}px`,
        top: `${y - 3}px`,
        width: `${Math.min(Math.max(width, 1), this.strip - left) + 6}px`,
        height: `${STRIP + 6}px`,
      });
      this.cursor.hidden = false;
      this.cursor.scrollIntoView({ block: "nearest" });
      const box = this.cursor.getBoundingClientRect();
      const lines = this.text.describe(offset);
      showTip(lines, box.left, box.bottom - 6);
      spoken.textContent = lines.join(". ");
    }

    // The offset that a key leads to, or null.
    target(key) {
      const { starts, pages, functionStarts } = this.text;
      const run = lastUpTo(starts, this.offset);
      const page = lastUpTo(pages, this.offset);
      const within = this.offset - pages[page];
      const at = lastUpTo(functionStarts, this.offset);
      const moved = (values, index) => values[Math.min(Math.max(index, 0), values.length - 1)];
      switch (key) {
        case "ArrowLeft":
          return moved(starts, this.offset > starts[run] ? run : run - 1);
        case "ArrowRight":
          return moved(starts, run + 1);
        case "ArrowUp":
          return page >= this.columns ? pages[page - this.columns] + within : this.offset;
        case "ArrowDown":
          return page + this.columns < pages.length ? pages[page + this.columns] + within : this.offset;
        case "PageUp":
          return functionStarts.length ? moved(functionStarts, at - 1) : null;
        case "PageDown":
          return functionStarts.length ? moved(functionStarts, at + 1) : null;
        case "Home":
          return starts[0];
        case "End":
          return starts[starts.length - 1];
        default:
          return null;
      }
    }
  }

  const drawings = [...document.querySelectorAll(".picture")].map((element) => new Drawing(element));

  for (const button of document.querySelectorAll("#legend button")) {
    button.addEventListener("click", () => {
      const kind = Number(button.dataset.kind);
      const on = !chosen.delete(kind);
      if (on) chosen.add(kind);
      button.setAttribute("aria-pressed", on);
      drawings.forEach((drawing) => drawing.redraw());
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    drawings.forEach((drawing) => drawing.redraw());
  });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // the height changes often on phones
    width = innerWidth;
    drawings.forEach((drawing) => drawing.lay());
  });
  addEventListener("scroll", hideTip, { passive: true });
})();
