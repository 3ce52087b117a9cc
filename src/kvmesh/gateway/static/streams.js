// Watches over server-sent events that come back by themselves, and stop while nobody looks at the page: browsers share
// six connections among all tabs of one address.

const RETRY_MS = 1000;
const SILENCE_MS = 10_000;

/**
 * Watch one streaming route. `onMessage` gets each result; `onState` gets "live", or "lost" with the number of tries,
 * or "refused" with what the gateway said. A stream that says nothing for `silenceMs` is opened anew; 0 = it may.
 */
export function watch(path, { onMessage, onState = () => {}, silenceMs = SILENCE_MS }) {
  let source = null;
  let timer = null;
  let tries = 0;

  const open = () => {
    close();
    if (document.hidden) return;
    source = new EventSource(path);
    expectMore();
    source.onmessage = (event) => {
      const message = JSON.parse(event.data);
      if (message.error) return again("refused", message.error.message);
      tries = 0;
      expectMore();
      onState("live");
      onMessage(message.result);
    };
    source.onerror = () => again("lost");
  };
  const again = (state, why) => {
    close();
    tries += 1;
    onState(state, state === "lost" ? tries : why);
    timer = setTimeout(open, RETRY_MS);
  };
  const expectMore = () => {
    clearTimeout(timer);
    timer = silenceMs ? setTimeout(() => again("lost"), silenceMs) : null;
  };
  const close = () => {
    clearTimeout(timer);
    source?.close();
    source = null;
  };

  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  open();
}

/** Yield the results of one streaming call. Throws CallError for what the mesh refuses or breaks off. */
export async function* call(path, body, { signal }) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json", accept: "text/event-stream" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new CallError(await response.json().catch(() => ({})), response.status);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const message = JSON.parse(event.replace(/^data: /, ""));
      if (message.error) throw new CallError(message.error, response.status);
      yield message.result;
    }
  }
}

/** What the mesh answered instead: its text and its reason. */
export class CallError extends Error {
  constructor(status, httpStatus) {
    super(status.message || `HTTP ${httpStatus}`);
    this.reason = status.details?.find((detail) => detail.reason)?.reason ?? "";
  }
}
