// Who came and who went. Those that left stay a while, so that an eye that was elsewhere finds them.

import { stateOf } from "./plan.js";

const GONE_S = 8;

/** Follows the workers of each look; `tell` hears what changed. */
export class Attendance {
  constructor(tell) {
    this.tell = tell;
    this.here = new Map(); // id -> worker
    this.left = new Map(); // id -> {worker, at}
    this.isFirst = true;
  }

  /** Take the workers of one look; return them with those that left lately (`gone`), by id. */
  follow(now, listed) {
    const next = new Map(listed.map((worker) => [worker.id, worker]));
    for (const [id, worker] of this.here) {
      if (next.has(id)) continue;
      this.left.set(id, { worker: { ...worker, gone: true }, at: now });
      this.tell(`${id} is gone.`);
    }
    for (const [id, worker] of next) {
      const news = this.newsOf(worker, this.here.get(id));
      if (news) this.tell(`${id} ${news}.`);
      this.left.delete(id);
    }
    for (const [id, { at }] of this.left) if (now - at > GONE_S) this.left.delete(id);
    this.here = next;
    this.isFirst = false;
    const all = [...listed, ...[...this.left.values()].map(({ worker }) => worker)];
    return all.sort((one, other) => (one.id < other.id ? -1 : Number(one.id > other.id)));
  }

  newsOf(worker, before) {
    if (!before && this.isFirst) return "";
    if (!before) return this.left.has(worker.id) ? "is back" : "has joined";
    if (before.epoch !== worker.epoch) return "was started anew";
    if (before.state === worker.state) return "";
    return `is ${stateOf(worker)}`;
  }
}
