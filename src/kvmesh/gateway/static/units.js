// Numbers as people read them, always with their unit. What is not known is "–", never 0.

export const UNKNOWN = "–";

const format = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** 16384 -> "16,384", for where the unit stands elsewhere. */
export function grouped(value) {
  return format.format(value);
}

/** 1234 "requests" -> "1,234 requests"; 1 "requests" -> "1 request". */
export function count(value, unit) {
  if (!isKnown(value)) return UNKNOWN;
  return `${grouped(value)} ${value === 1 ? singular(unit) : unit}`;
}

/** Three figures at most: 0.123, 1.23, 12.3, 123, 1,230. */
export function figure(value) {
  if (!isKnown(value)) return UNKNOWN;
  const size = Math.abs(value);
  if (size >= 99.95) return grouped(value);
  return String(Number(value.toFixed(size >= 9.995 ? 1 : size >= 0.995 ? 2 : 3)));
}

/** A figure and its unit. */
export function amount(value, unit) {
  return isKnown(value) ? `${figure(value)} ${value === 1 ? singular(unit) : unit}` : UNKNOWN;
}

/** Seconds -> "850 µs", "12.3 ms", "1.23 s". */
export function span(seconds) {
  if (!isKnown(seconds)) return UNKNOWN;
  if (seconds === 0) return "0 ms";
  if (seconds < 0.000995) return `${figure(seconds * 1e6)} µs`;
  if (seconds < 0.9995) return `${figure(seconds * 1e3)} ms`;
  return `${figure(seconds)} s`;
}

/** Bytes -> "512 B", "1.5 kB", "2.25 MB". */
export function bytes(value) {
  if (!isKnown(value)) return UNKNOWN;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (value >= 999.5 && power < units.length - 1) {
    value /= 1000;
    power += 1;
  }
  return `${figure(value)} ${units[power]}`;
}

/** 0.1234 -> "12.3 %". */
export function share(part) {
  return isKnown(part) ? `${figure(part * 100)} %` : UNKNOWN;
}

/** The contract's Duration in JSON, "0.012s" -> 0.012; null where it is unset. */
export function seconds(duration) {
  return typeof duration === "string" ? Number.parseFloat(duration) : null;
}

/** 64-bit counts are texts in JSON. */
export function integer(value) {
  return Number(value ?? 0);
}

/** The clock of the reader: "14:03:05". */
export function clock(date) {
  return date.toLocaleTimeString("en-GB");
}

/** A long id in `room` characters, its end kept: that is what tells workers apart. */
export function shortened(id, room) {
  if (id.length <= room) return id;
  const tail = Math.ceil((room - 1) * 0.65);
  return `${id.slice(0, Math.max(room - 1 - tail, 0))}…${id.slice(-tail)}`;
}

/** "requests" -> "request", "requests/s" -> "request/s". */
function singular(unit) {
  return unit.replace(/s(?=\/|$)/, "");
}

function isKnown(value) {
  return typeof value === "number" && Number.isFinite(value);
}
