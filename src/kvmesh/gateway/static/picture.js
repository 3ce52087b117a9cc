// The mesh as a picture: a node per role, an edge per way that something takes, live while something takes it.

import { byId, el, setAttribute, setText, svg } from "./dom.js";
import { NODE, planOf } from "./plan.js";
import { UNKNOWN, amount, bytes, count, shortened } from "./units.js";

const CHARACTER = 7.3;
const PADDING = 12;

/** Draws into one element, anew where its width or the set of nodes changes, else only what is new. */
export class Picture {
  constructor(holder) {
    this.holder = holder;
    this.nodes = new Map();
    this.edges = new Map();
    this.key = "";
    this.sight = null;
    this.path = null;
    new ResizeObserver(() => this.sight && this.draw(this.sight)).observe(holder);
  }

  /** Show a look: `workers` (gone ones too), `queue`, `counters`, `policy`, `silent`, `rates`, `lately` chosen ones. */
  draw(sight) {
    this.sight = sight;
    const width = Math.floor(this.holder.clientWidth);
    if (!width) return;
    const plan = planOf(sight, width);
    const key = [width, ...plan.nodes.map((node) => node.id), sight.workers.length].join("|");
    if (key !== this.key) this.build(plan, key);
    for (const node of plan.nodes) this.update(node);
    for (const edge of plan.edges) this.updateEdge(edge);
    setText(byId("picture-text"), inWords(sight));
  }

  /** Mark the way of one request: `{worker, remote}`, or null for none. */
  show(path) {
    this.path = path;
    if (this.sight) this.draw(this.sight);
  }

  build(plan, key) {
    this.key = key;
    this.nodes.clear();
    this.edges.clear();
    const picture = svg("svg", {
      viewBox: `0 0 ${plan.width} ${plan.height}`,
      width: plan.width,
      height: plan.height,
      role: "img",
      "aria-labelledby": "mesh-title picture-text",
    });
    for (const edge of plan.edges) {
      const line = svg("path", { d: edge.d, class: "edge", "data-edge": `${edge.from}>${edge.to}` });
      this.edges.set(edge.id, line);
      picture.append(line);
    }
    for (const node of plan.nodes) picture.append(this.buildNode(node));
    this.holder.replaceChildren(picture);
  }

  buildNode(node) {
    const room = Math.floor((node.width - 2 * PADDING - (node.kind === "worker" ? 14 : 0)) / CHARACTER);
    const texts = [0, 1, 2].map((line) =>
      svg("text", { x: PADDING, y: [23, 42, 58][line], class: line ? "small" : "name" }),
    );
    const frame = svg("rect", { width: node.width, height: NODE.height, rx: 9, class: "frame" });
    const group = svg("g", { class: "node", transform: `translate(${node.x} ${node.y})` }, frame, ...texts);
    const title = svg("title");
    group.prepend(title);
    const parts = { group, texts, title, room };
    if (node.bar !== undefined) {
      const barWidth = node.width - 2 * PADDING;
      parts.dot = svg("circle", { cx: node.width - PADDING - 4, cy: 19, r: 5, class: "dot" });
      parts.fill = svg("rect", { x: PADDING, y: 65, width: 0, height: 5, rx: 2.5, class: "fill" });
      parts.barWidth = barWidth;
      group.append(
        parts.dot,
        svg("rect", { x: PADDING, y: 65, width: barWidth, height: 5, rx: 2.5, class: "trough" }),
        parts.fill,
      );
    }
    this.nodes.set(node.id, parts);
    return group;
  }

  update(node) {
    const parts = this.nodes.get(node.id);
    const onPath = this.path !== null && isOnPath(node, this.path);
    setAttribute(parts.group, "class", `node ${node.kind} ${node.state ?? ""} ${onPath ? "on-path" : ""}`);
    setText(parts.title, [node.name, ...node.lines].join(", "));
    setText(parts.texts[0], shortened(node.name, parts.room));
    node.lines.forEach((line, index) => setText(parts.texts[index + 1], line));
    for (const text of parts.texts) fit(text, node.width - 2 * PADDING);
    if (parts.fill && node.bar !== undefined)
      setAttribute(parts.fill, "width", (parts.barWidth * Math.min(node.bar, 1)).toFixed(1));
  }

  updateEdge(edge) {
    const onPath = this.path !== null && isEdgeOnPath(edge, this.path);
    const line = this.edges.get(edge.id);
    setAttribute(line, "class", `edge ${edge.kind} ${edge.live ? "live" : ""} ${onPath ? "on-path" : ""}`);
    setAttribute(line, "stroke-width", edge.live ? Math.min(1.75 + Math.log2(1 + edge.weight) / 2, 4) : 1.25);
  }
}

/** Show beside the picture what its colours mean, and how much of it there is. */
export function drawFlows(list, rates) {
  const flows = [
    ["request", "requests", amount(rates.requests, "requests/s")],
    ["task", "prefill tasks", amount(rates.tasks, "tasks/s")],
    ["kv", "KV moved", rates.kvBytes === null ? UNKNOWN : `${bytes(rates.kvBytes)}/s`],
  ];
  if (!list.children.length) {
    for (const [kind, name] of flows)
      list.append(el("li", {}, el("i", { class: `swatch ${kind}` }), `${name} `, el("b", { class: "quantity" })));
  }
  flows.forEach(([, , text], index) => setText(list.children[index].querySelector("b"), text));
}

function isOnPath(node, path) {
  if (node.id === "gateway" || node.id === "router") return true;
  if (node.worker === path.worker) return true;
  return path.remote && (node.id === "queue" || node.id === "kv");
}

function isEdgeOnPath(edge, path) {
  const worker = `worker ${path.worker}`;
  const ends = [edge.from, edge.to];
  if (ends.includes("router") || (ends.includes("gateway") && ends.includes(worker))) return true;
  return path.remote && ends.includes(worker) && (ends.includes("queue") || ends.includes("kv"));
}

/** Squeeze a text that is wider than its node; most are not. */
function fit(text, width) {
  text.removeAttribute("textLength");
  if (text.getComputedTextLength() <= width) return;
  setAttribute(text, "textLength", width);
  setAttribute(text, "lengthAdjust", "spacingAndGlyphs");
}

function inWords({ workers, queue }) {
  const alive = workers.filter((worker) => !worker.gone);
  const of = (role) => count(alive.filter((worker) => worker.role === role).length, `${role} workers`);
  const tasks = queue ? "a prefill queue" : "no prefill queue";
  return `Gateway, router, ${of("decode")}, ${tasks} and ${of("prefill")}.`;
}
