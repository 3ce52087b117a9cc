// What the gateway has said, second by second: counters become rates, and all of it points for the charts.

import { SHOWN_S } from "./charts.js";
import { integer, seconds } from "./units.js";

const RATE_S = 5;
const HIT_S = 30;
const GAP_S = 4;

/** Remembers two minutes of points, and counters for as long as rates need them. */
export class History {
  constructor() {
    this.looks = []; // {at, counters}, by the page's clock in seconds
    this.points = []; // {at, ...figures}; a figure that is not known is null
  }

  /** Take one look of the topology; return its figures. */
  add(now, { counters, latencies, queue }) {
    this.remember(now, counters);
    const figures = {
      ...this.rates(),
      ...latenciesOf(latencies),
      depth: queue?.depth ?? null,
      leased: queue?.leased ?? null,
    };
    const last = this.points.at(-1);
    if (last && now - last.at > GAP_S) this.points.push({ at: now }); // the page was hidden, or the gateway away
    this.points.push({ at: now, ...figures });
    while (now - this.points[0].at > SHOWN_S) this.points.shift();
    return figures;
  }

  /** Return points of these figures alone. */
  of(names) {
    return this.points.map((point) => ({ at: point.at, values: names.map((name) => point[name] ?? null) }));
  }

  /** Counters that went back are another gateway's, and nothing before them counts. */
  remember(now, counters) {
    const last = this.looks.at(-1);
    if (last && integer(counters.requests) < integer(last.counters.requests)) this.looks = [];
    this.looks.push({ at: now, counters });
    while (this.looks.length > 2 && now - this.looks[1].at > HIT_S) this.looks.shift();
  }

  /** Return what happened per second of the last five, and the shares of the last thirty. */
  rates() {
    const newest = this.looks.at(-1);
    const oldest = this.looks[0];
    const before = this.looks.find(({ at }) => newest.at - at <= RATE_S + 0.5);
    const grown = (name, since) => Math.max(integer(newest.counters[name]) - integer(since.counters[name]), 0);
    const elapsed = newest.at - before.at;
    const rate = (name) => (elapsed > 0 ? grown(name, before) / elapsed : null);
    const prompts = grown("prompt_tokens", oldest);
    const part = (name) => (prompts > 0 ? grown(name, oldest) / prompts : null);
    return {
      requests: rate("requests"),
      tokens: rate("completion_tokens"),
      kvBytes: rate("kv_bytes_moved"),
      tasks: rate("remote_prefills"),
      hits: part("cached_tokens"),
      predicted: part("predicted_cached_tokens"),
    };
  }
}

function latenciesOf(latencies) {
  const [ttft, itl] = [latencies?.time_to_first_token, latencies?.inter_token_time];
  return {
    ttftP50: seconds(ttft?.p50),
    ttftP99: seconds(ttft?.p99),
    itlP50: seconds(itl?.p50),
    itlP99: seconds(itl?.p99),
  };
}
