// What the picture of the mesh shows, and where. Pure: a look at the mesh and a width in, nodes and edges out.
//
//     wide:    gateway --> decode workers --> queue --> prefill workers      narrow: the same from top to bottom
//              router                     <-- KV   <--

import { UNKNOWN, amount, bytes, count, grouped, integer } from "./units.js";

export const NODE = { height: 78, gap: 16 };
const WIDE_FROM = 900;
const MOST = { wide: 8, narrow: 6 };
const STATES = {
  WORKER_STATE_READY: "ready",
  WORKER_STATE_DRAINING: "draining",
  WORKER_STATE_SUSPECT: "suspect",
};

/** Say in a word what state a worker of the topology is in. */
export function stateOf(worker) {
  return worker.gone ? "gone" : (STATES[worker.state] ?? "unknown");
}

/** Return `{width, height, nodes, edges}`, in pixels, for a picture of this width. */
export function planOf(sight, width) {
  const isWide = width >= WIDE_FROM;
  const most = isWide ? MOST.wide : MOST.narrow;
  const decode = workerNodes(sight, "decode", most);
  const prefill = workerNodes(sight, "prefill", most);
  const doors = [gatewayNode(sight), routerNode(sight)];
  const between = prefill.length ? [kvNode(sight), queueNode(sight)] : [];
  const size = isWide
    ? placeColumns([doors, decode, between, prefill], width)
    : placeRows([doors, decode, between, prefill], width);
  const nodes = [...doors, ...decode, ...between, ...prefill];
  return { ...size, nodes, edges: edgesOf(sight, { doors, decode, between, prefill, isWide }) };
}

function gatewayNode({ counters, rates }) {
  return {
    id: "gateway",
    kind: "role",
    name: "gateway",
    lines: [amount(rates.requests, "requests/s"), `${count(counters.running, "requests")} running`],
  };
}

function routerNode({ policy, counters, silent }) {
  const lines = silent.router ? ["not answering", ""] : [policy || UNKNOWN, count(counters.reservations, "bookings")];
  return { id: "router", kind: "role", name: "router", lines };
}

function queueNode({ queue, silent }) {
  const lines = queue
    ? [`${count(queue.depth, "tasks")} waiting`, `${count(queue.leased, "tasks")} leased`]
    : [silent.queue ? "not answering" : "none known", ""];
  return { id: "queue", kind: "role", name: "prefill queue", lines };
}

function kvNode({ counters, rates }) {
  const moved = bytes(integer(counters.kv_bytes_moved));
  return {
    id: "kv",
    kind: "role",
    name: "KV blocks",
    lines: [rates.kvBytes === null ? UNKNOWN : `${bytes(rates.kvBytes)}/s`, `${moved} in all`],
  };
}

function workerNodes({ workers }, role, most) {
  const all = workers.filter((worker) => worker.role === role);
  const shown = all.length > most ? all.slice(0, most - 1) : all;
  const nodes = shown.map((worker) => workerNode(worker));
  const left = all.slice(shown.length);
  if (left.length) {
    const running = left.reduce((sum, worker) => sum + worker.active_requests, 0);
    const isTold = left.every((worker) => !worker.load_unknown);
    nodes.push({
      id: `more-${role}`,
      kind: "more",
      name: `and ${left.length} more`,
      lines: [`${isTold ? running : UNKNOWN} running`, "all in the table below"],
      load: running,
    });
  }
  return nodes;
}

function workerNode(worker) {
  const state = stateOf(worker);
  const unit = worker.role === "prefill" ? "tasks" : "requests";
  const total = integer(worker.total_blocks);
  const waiting = worker.waiting_requests ? `, ${worker.waiting_requests} waiting` : "";
  const running = worker.load_unknown ? UNKNOWN : count(worker.active_requests, unit) + waiting;
  const used = worker.load_unknown ? UNKNOWN : grouped(integer(worker.active_blocks));
  const blocks = total ? `${used} of ${count(total, "blocks")}` : "no block pool";
  return {
    id: `worker ${worker.id}`,
    worker: worker.id,
    role: worker.role,
    kind: "worker",
    state,
    name: worker.id,
    lines: [state === "ready" ? running : `${state}: ${running}`, blocks],
    bar: total ? integer(worker.active_blocks) / total : 0,
    load: worker.gone ? 0 : worker.active_requests,
  };
}

/** Give the nodes of each column their places, every column centred; return the size of the whole. */
function placeColumns(columns, width) {
  const widths = [150, 236, 150, 236];
  const used = columns.map((column, index) => (column.length ? widths[index] : 0));
  const gaps = columns.filter((column) => column.length).length - 1;
  const gap = Math.min((width - used.reduce((sum, one) => sum + one, 0) - 2) / gaps, 190);
  const step = NODE.height + NODE.gap;
  const height = Math.max(...columns.map((column) => column.length)) * step - NODE.gap + 2;
  let x = Math.max((width - used.reduce((sum, one) => sum + one, 0) - gap * gaps) / 2, 1);
  columns.forEach((column, index) => {
    if (!column.length) return;
    const top = (height - (column.length * step - NODE.gap)) / 2;
    column.forEach((node, row) => Object.assign(node, { x, y: top + row * step, width: widths[index] }));
    x += widths[index] + gap;
  });
  return { width, height };
}

/** Give the nodes of each row their places, two beside each other. */
function placeRows(rows, width) {
  const nodeWidth = Math.min((width - 2 - NODE.gap) / 2, 300);
  const left = (width - 2 * nodeWidth - NODE.gap) / 2;
  let y = 1;
  for (const row of rows.filter((one) => one.length)) {
    row.forEach((node, index) => {
      const alone = row.length === 1 ? (nodeWidth + NODE.gap) / 2 : 0;
      Object.assign(node, {
        x: left + alone + (index % 2) * (nodeWidth + NODE.gap),
        y: y + Math.floor(index / 2) * (NODE.height + NODE.gap),
        width: nodeWidth,
      });
    });
    y += Math.ceil(row.length / 2) * (NODE.height + NODE.gap) + 30;
  }
  return { width, height: y - NODE.gap - 29 };
}

function edgesOf(sight, { doors, decode, between, prefill, isWide }) {
  const [gateway, router] = doors;
  const [kv, queue] = between;
  const { rates, lately } = sight;
  const isBusy = (node) => node.load > 0 || lately.has(node.worker);
  const edges = [];
  const add = (from, to, kind, live, weight = 1) => {
    edges.push({
      id: `${from.id}>${to.id}`,
      from: from.id,
      to: to.id,
      kind,
      live: Boolean(live),
      weight,
      d: curve(from, to, isWide),
    });
  };
  add(router, gateway, "request", rates.requests > 0);
  for (const node of decode) {
    add(gateway, node, "request", isBusy(node), node.load);
    if (queue) add(node, queue, "task", sight.queue !== null && rates.tasks > 0 && isBusy(node), rates.tasks);
    if (kv) add(kv, node, "kv", rates.kvBytes > 0 && isBusy(node), rates.kvBytes / 1e6);
  }
  for (const node of prefill) {
    const works = node.state !== "gone" && (node.load > 0 || rates.tasks > 0);
    add(queue, node, "task", works && sight.queue !== null, node.load || rates.tasks);
    add(node, kv, "kv", rates.kvBytes > 0 && works, rates.kvBytes / 1e6);
  }
  return edges;
}

/** Draw from one node's side to the other's nearest one. */
function curve(from, to, isWide) {
  const centre = (node) => [node.x + node.width / 2, node.y + NODE.height / 2];
  const [[x1, y1], [x2, y2]] = [centre(from), centre(to)];
  if (isWide && Math.abs(x1 - x2) > 1) {
    const [start, end] = x1 < x2 ? [from.x + from.width, to.x] : [from.x, to.x + to.width];
    const middle = (start + end) / 2;
    return `M${start} ${y1}C${middle} ${y1} ${middle} ${y2} ${end} ${y2}`;
  }
  if (Math.abs(y1 - y2) <= 1)
    return `M${x1 < x2 ? from.x + from.width : from.x} ${y1}H${x1 < x2 ? to.x : to.x + to.width}`;
  const [start, end] = y1 < y2 ? [from.y + NODE.height, to.y] : [from.y, to.y + NODE.height];
  const middle = (start + end) / 2;
  return `M${x1} ${start}C${x1} ${middle} ${x2} ${middle} ${x2} ${end}`;
}
