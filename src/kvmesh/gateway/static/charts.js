// Lines over the last two minutes. A gap is where nothing was known.

import { el, setAttribute, setText, svg } from "./dom.js";
import { UNKNOWN } from "./units.js";

const HEIGHT = 132;
const EDGE = { right: 8, top: 10, bottom: 22 };
const TICK = { character: 7.2, gap: 6 };
export const SHOWN_S = 120;

/** One chart: `series` are [name, class] pairs, `format` writes a value with its unit, `most` bounds the axis. */
export class Chart {
  constructor(holder, { id, title, series, format, most = Infinity, empty }) {
    this.format = format;
    this.most = most;
    this.series = series;
    this.empty = empty;
    this.title = title;
    this.values = series.map(([name, kind]) => {
      const value = el("b", { class: "quantity" });
      return { value, item: el("li", {}, el("i", { class: `swatch ${kind}` }), `${name} `, value) };
    });
    this.plot = el("div", { class: "plot" });
    this.card = el(
      "figure",
      { class: "card chart", id: `chart-${id}` },
      el(
        "figcaption",
        {},
        el("h3", { text: title }),
        el("ul", { class: "legend" }, ...this.values.map(({ item }) => item)),
      ),
      this.plot,
    );
    holder.append(this.card);
    new ResizeObserver(() => this.points && this.draw(this.points, this.now)).observe(this.plot);
  }

  /** Draw points `{at, values}`, `at` in seconds and ascending, a value null where it is not known. */
  draw(points, now) {
    this.points = points;
    this.now = now;
    const width = Math.floor(this.plot.clientWidth);
    if (!width) return;
    const last = points.at(-1)?.values ?? [];
    this.values.forEach(({ value }, index) => setText(value, this.say(last[index])));
    const known = points.flatMap(({ values }) => values).filter((value) => value !== null);
    if (!known.length) return this.plot.replaceChildren(el("p", { class: "empty", text: this.empty }));
    const top = Math.min(niceAbove(Math.max(...known)), this.most);
    const chart = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img" });
    setAttribute(
      chart,
      "aria-label",
      `${this.title}: ${this.series.map(([name], index) => `${name} ${this.say(last[index])}`).join(", ")}`,
    );
    const ticks = [0, top / 2, top].map((value) => ({ value, text: this.format(value) }));
    const left = Math.ceil(Math.max(...ticks.map(({ text }) => text.length)) * TICK.character) + TICK.gap;
    const x = (at) => width - EDGE.right - ((now - at) / SHOWN_S) * (width - left - EDGE.right);
    const y = (value) => HEIGHT - EDGE.bottom - (Math.min(value, top) / top) * (HEIGHT - EDGE.top - EDGE.bottom);
    for (const { value, text } of ticks) {
      chart.append(
        svg("line", { x1: left, x2: width - EDGE.right, y1: y(value), y2: y(value), class: value ? "grid" : "axis" }),
        svg("text", { x: left - TICK.gap, y: y(value) + 4, class: "tick", "text-anchor": "end", text }),
      );
    }
    chart.append(
      svg("text", { x: left, y: HEIGHT - 6, class: "tick", text: "2 min ago" }),
      svg("text", { x: width - EDGE.right, y: HEIGHT - 6, class: "tick", "text-anchor": "end", text: "now" }),
    );
    this.series.forEach(([, kind], index) => {
      const d = lineOf(points, index, x, y);
      if (d) chart.append(svg("path", { d, class: `line ${kind}` }));
    });
    this.plot.replaceChildren(chart);
  }

  say(value) {
    return value === null || value === undefined ? UNKNOWN : this.format(value);
  }
}

function lineOf(points, index, x, y) {
  let d = "";
  let isOpen = false;
  for (const { at, values } of points) {
    if (values[index] === null) {
      isOpen = false;
      continue;
    }
    const place = `${x(at).toFixed(1)} ${y(values[index]).toFixed(1)}`;
    d += isOpen ? `L${place}` : `M${place}h0.01`; // a point between two gaps is seen as a dot
    isOpen = true;
  }
  return d;
}

/** The next of 1, 2, 5, 10, ... above a value, so that the axis has round numbers and rarely jumps. */
function niceAbove(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 1.05) ?? 20 * power;
}
