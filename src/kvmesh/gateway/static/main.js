// The page: what the gateway says once a second, remembered for two minutes, drawn.

import { Attendance } from "./attendance.js";
import { Chart } from "./charts.js";
import { Decisions } from "./decisions.js";
import { byId, el, setAttribute, setText } from "./dom.js";
import { History } from "./history.js";
import { Picture, drawFlows } from "./picture.js";
import { setUpPrompt } from "./prompt.js";
import { watch } from "./streams.js";
import { setUpTheme } from "./theme_button.js";
import { UNKNOWN, amount, bytes, clock, count, integer, share, span } from "./units.js";
import { WorkerTable } from "./workers.js";

const LATELY_MS = 2000;
const EVENTS = 40;
const CACHES = {
  events: "caches known by events",
  approximate: "caches guessed from what was routed",
  off: "caches not known",
};

const lately = new Map(); // decode worker -> when it was chosen
let isConnected = false;

const history = new History();
const attendance = new Attendance(tell);
const picture = new Picture(byId("picture"));
const table = new WorkerTable(byId("workers"), byId("workers-note"));
const decisions = new Decisions(byId("decisions"), byId("decisions-note"), byId("hold"));
const per = (unit) => (value) => amount(value, unit);
const charts = [
  {
    id: "ttft",
    title: "Time to first token",
    series: [
      ["p50", "request"],
      ["p99", "alarm"],
    ],
    format: span,
    of: ["ttftP50", "ttftP99"],
    empty: "No request had its first token in these two minutes.",
  },
  {
    id: "itl",
    title: "Inter-token time",
    series: [
      ["p50", "request"],
      ["p99", "alarm"],
    ],
    format: span,
    of: ["itlP50", "itlP99"],
    empty: "No request of two tokens or more finished in these two minutes.",
  },
  {
    id: "hits",
    title: "Cache hits of prompt tokens",
    series: [
      ["actual", "good"],
      ["predicted", "task dashed"],
    ],
    format: share,
    most: 1,
    of: ["hits", "predicted"],
    empty: "No request finished in these two minutes.",
  },
  {
    id: "tokens",
    title: "Tokens produced",
    series: [["all workers", "request"]],
    format: per("tokens/s"),
    of: ["tokens"],
    empty: "No tokens yet.",
  },
  {
    id: "queue",
    title: "Prefill queue",
    series: [
      ["waiting", "task"],
      ["leased", "request"],
    ],
    format: per("tasks"),
    of: ["depth", "leased"],
    empty: "No prefill queue answers.",
  },
  {
    id: "kv",
    title: "KV moved",
    series: [["all transports", "kv"]],
    format: (value) => `${bytes(value)}/s`,
    of: ["kvBytes"],
    empty: "No KV has moved yet.",
  },
].map((one) => ({ ...one, chart: new Chart(byId("charts"), one) }));
const tiles = new Map(
  ["running", "requests", "tokens", "time to first token", "inter-token time", "cache hits", "KV moved", "failed"].map(
    (name) => {
      const value = el("dd", { class: "quantity", text: UNKNOWN });
      const more = el("dd", { class: "more" });
      byId("tiles").append(el("div", { class: "tile" }, el("dt", { text: name }), value, more));
      return [name, { value, more }];
    },
  ),
);

setUpTheme(byId("theme"));
setUpPrompt({ onPath: (path) => picture.show(path) });
watch("mesh/v1/topology:watch?interval=1s", { onMessage: ({ topology }) => look(topology), onState: onConnection });
watch("mesh/v1/router/decisions:watch?interval=1s&max_decisions=8&max_candidates=8", {
  silenceMs: 0,
  onMessage: (message) => {
    const now = performance.now();
    for (const { explanation } of message.decisions) lately.set(explanation.worker_id, now);
    decisions.add(message);
  },
  onState: (state, why) => {
    if (state !== "live") {
      decisions.fail(state === "refused" ? `The router does not answer: ${why}` : "Waiting for the gateway …");
    }
  },
});

/** Take one look at the mesh. */
function look(topology) {
  const now = performance.now() / 1000;
  const figures = history.add(now, topology);
  const workers = attendance.follow(now, topology.workers);
  for (const [worker, at] of lately) if (performance.now() - at > LATELY_MS) lately.delete(worker);
  const { counters, policy, queue = null } = topology;
  const silent = { router: topology.router_silent, queue: topology.queue_silent };
  if (silent.router) counters.reservations = null;
  picture.draw({ workers, queue, counters, policy, silent, rates: figures, lately });
  drawFlows(byId("flows"), figures);
  table.draw(workers);
  drawTiles(counters, figures);
  for (const { chart, of } of charts) chart.draw(history.of(of), now);
  const known = CACHES[topology.index] ?? CACHES.off;
  setText(byId("policy"), policy ? `routed by ${policy}, ${known}` : "");
}

function drawTiles(counters, figures) {
  const show = (name, text, more) => {
    const tile = tiles.get(name);
    if (tile.value.textContent !== text) {
      const [number, ...unit] = text.split(" ");
      tile.value.replaceChildren(number, ...(unit.length ? [" ", el("small", { text: unit.join(" ") })] : []));
    }
    setText(tile.more, more);
  };
  const prefills = integer(counters.remote_prefills);
  const failed = integer(counters.failed);
  show("running", count(counters.running, "requests"), `${count(counters.reservations, "bookings")} held`);
  show("requests", amount(figures.requests, "requests/s"), `${count(integer(counters.requests), "requests")} so far`);
  show("tokens", amount(figures.tokens, "tokens/s"), `${count(integer(counters.completion_tokens), "tokens")} so far`);
  show("time to first token", span(figures.ttftP50), `p50; p99 ${span(figures.ttftP99)}`);
  show("inter-token time", span(figures.itlP50), `p50; p99 ${span(figures.itlP99)}`);
  show("cache hits", share(figures.hits), `predicted ${share(figures.predicted)}`);
  show(
    "KV moved",
    figures.kvBytes === null ? UNKNOWN : `${bytes(figures.kvBytes)}/s`,
    `${count(prefills, "remote prefills")}`,
  );
  show("failed", count(failed, "requests"), `${count(integer(counters.cancelled), "requests")} cancelled`);
  tiles.get("failed").value.classList.toggle("bad", failed > 0);
}

function onConnection(state, detail) {
  const banner = byId("connection");
  const texts = {
    live: "live",
    lost: `the gateway does not answer; trying again (${count(detail, "tries")})`,
    refused: detail,
  };
  setAttribute(banner, "data-state", state);
  setText(banner, texts[state]);
  if (state === "live" && !isConnected)
    tell(history.points.length ? "Connected to the gateway again." : "Connected to the gateway.");
  if (state !== "live" && isConnected) tell("The gateway does not answer.");
  isConnected = state === "live";
  document.body.classList.toggle("lost", !isConnected && history.points.length > 0);
}

function tell(text) {
  const now = new Date();
  byId("events").prepend(
    el("li", {}, el("time", { datetime: now.toISOString(), text: clock(now) }), " ", el("span", { text })),
  );
  while (byId("events").children.length > EVENTS) byId("events").lastChild.remove();
}
