// The box that sends a prompt: tokens as they arrive, and the path they took.

import { byId, el, setText } from "./dom.js";
import { costOf, explained } from "./decisions.js";
import { CallError, call } from "./streams.js";
import { amount, bytes, count, integer, share, span } from "./units.js";

const REASONS = { FINISH_REASON_STOP: "the model ended it", FINISH_REASON_LENGTH: "the length was reached" };

/** Wire the form; `onPath` is told who serves the request, null once the next one begins. */
export function setUpPrompt({ onPath }) {
  const form = byId("prompt-form");
  const prompt = byId("prompt");
  let running = null;

  const send = async () => {
    running?.abort();
    const own = new AbortController();
    running = own;
    byId("stop").disabled = false;
    byId("send").disabled = true;
    onPath(null);
    try {
      await run(requestOf(prompt.value), own.signal, onPath);
    } finally {
      if (running === own) {
        running = null;
        byId("stop").disabled = true;
        byId("send").disabled = false;
      }
    }
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  byId("stop").addEventListener("click", () => running?.abort());
}

function requestOf(text) {
  return {
    prompt: { text },
    sampling: { max_tokens: Number(byId("max-tokens").value), temperature: Number(byId("temperature").value) },
    explain: true,
  };
}

async function run(request, signal, onPath) {
  const view = { output: byId("output"), status: byId("prompt-status"), path: byId("path") };
  const began = performance.now();
  let firstAt = null;
  let started = null;
  let finished = null;
  view.output.replaceChildren();
  view.path.replaceChildren(el("li", { class: "empty", text: "Waiting for the router …" }));
  setText(view.status, "Sent; waiting for the first token.");
  try {
    for await (const event of call("mesh/v1/generate", request, { signal })) {
      if (event.started) {
        started = event.started;
        onPath({ worker: started.worker_id, remote: Boolean(started.prefill?.remote) });
        view.path.replaceChildren(...pathTo(started));
      } else if (event.chunk) {
        firstAt ??= performance.now();
        append(view.output, event.chunk.text);
        setText(view.status, "Tokens are arriving.");
      } else if (event.finished) {
        finished = event.finished;
      }
    }
    if (!finished) throw new Error("The stream ended without its last message: the gateway may have gone.");
  } catch (error) {
    setText(view.status, signal.aborted ? "Stopped: the mesh has cancelled it." : failureText(error));
    if (!started) view.path.replaceChildren(el("li", { class: "empty", text: "It reached no worker." }));
    return;
  }
  view.output.querySelector(".fresh")?.classList.remove("fresh");
  const { usage } = finished;
  const firstS = ((firstAt ?? performance.now()) - began) / 1000;
  const wholeS = (performance.now() - began) / 1000;
  setText(view.status, `Done in ${span(wholeS)}: ${REASONS[finished.reason] ?? "ended"}.`);
  view.path.append(...pathFrom(started, usage, { firstS, wholeS }));
}

function append(output, text) {
  output.querySelector(".fresh")?.classList.remove("fresh");
  output.append(el("span", { class: "fresh", text }));
  output.scrollTop = output.scrollHeight;
}

function failureText(error) {
  if (error instanceof CallError && error.reason) return `${error.reason}: ${error.message}`;
  return error instanceof TypeError ? "The gateway does not answer." : error.message;
}

/** What is known when the first token comes: who decided, who decodes, where the prefill ran. */
function pathTo(started) {
  const { explanation } = started;
  const chosen = explanation?.candidates.find((candidate) => candidate.worker_id === started.worker_id);
  const cost = chosen ? `, at a cost of ${costOf(chosen.cost, explanation.policy)}` : "";
  const decision = explanation
    ? `${explanation.policy} chose among ${count(explanation.candidates.length, "candidates")}${cost}`
    : "not explained";
  const details = explanation
    ? el("details", {}, el("summary", { text: "every term" }), ...explained(explanation))
    : null;
  const again = started.attempt > 1 ? `, attempt ${started.attempt}: an earlier worker failed` : "";
  const expected = `expected to hold ${count(started.predicted_cached_tokens, "tokens")} of the prompt`;
  const prefill = started.prefill;
  return [
    step("router", decision, "request", details),
    step("decode worker", `${started.worker_id}${again}, ${expected}`, "request"),
    step("prefill", prefillText(prefill), prefill?.remote ? "task" : "request"),
  ];
}

function prefillText(prefill) {
  if (!prefill) return "on the decode worker";
  if (prefill.remote) return "remote, on a prefill worker";
  return `local, on the decode worker: ${prefill.reason.replaceAll("_", " ")}`;
}

/** What is known at the end: what was cached, what moved, how long it took. */
function pathFrom(started, usage, { firstS, wholeS }) {
  const tokens = usage.completion_tokens;
  const moved = integer(usage.kv_bytes_moved);
  const cached = count(usage.cached_tokens, "tokens");
  const part = share(usage.prompt_tokens ? usage.cached_tokens / usage.prompt_tokens : 0);
  const parts = [
    step("cache", `${cached} of ${count(usage.prompt_tokens, "prompt tokens")} were cached (${part})`, "request"),
  ];
  if (usage.remote_prefill_tokens || moved) {
    parts.push(
      step(
        "KV moved",
        `${count(usage.remote_prefill_tokens, "tokens")} computed by the prefill worker, ${bytes(moved)} moved`,
        "kv",
      ),
    );
  }
  const rate =
    tokens > 1 && wholeS > firstS ? `, ${amount((tokens - 1) / (wholeS - firstS), "tokens/s")} from there on` : "";
  parts.push(step("tokens", `${count(tokens, "tokens")}, the first after ${span(firstS)}${rate}`, "request"));
  parts.push(el("li", { class: "note", text: `Request ${started.request_id}` }));
  return parts;
}

function step(name, text, kind, details = null) {
  return el("li", { class: kind }, el("b", { text: name }), " ", el("span", { class: "quantity", text }), details);
}
