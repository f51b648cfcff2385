// From bytes to lines, characters and events: pure functions and transforms, without the DOM.

const NEWLINE = 0x0a;
const strictUtf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** Cut bytes as client.py does: at most `size` at a time, even in the middle of a character. */
export function cut(bytes, size = 16) {
  const pieces = [];
  for (let start = 0; start < bytes.length; start += size) {
    pieces.push(bytes.subarray(start, start + size));
  }
  return pieces;
}

/**
 * Write bytes as Python writes them: complete characters as they are, a newline as \n, and the bytes
 * of a character that was cut as \xe2\x98. Returns parts: [{ text, split }].
 */
export function describe(bytes) {
  const parts = [];
  const add = (text, split) => {
    const last = parts.at(-1);
    if (last?.split === split) last.text += text;
    else parts.push({ text, split });
  };
  for (let i = 0; i < bytes.length;) {
    const character = characterAt(bytes, i);
    if (character === null) {
      add(`\\x${hex(bytes[i])}`, true);
      i += 1;
    } else {
      add(escape(character), false);
      i += lengthFrom(bytes[i]);
    }
  }
  return parts;
}

/** The length of the character that starts with this byte; 0 if no character does. */
function lengthFrom(byte) {
  if (byte < 0x80) return 1;
  if (byte >= 0xc2 && byte < 0xe0) return 2;
  if (byte >= 0xe0 && byte < 0xf0) return 3;
  return byte >= 0xf0 && byte < 0xf5 ? 4 : 0;
}

function characterAt(bytes, start) {
  const length = lengthFrom(bytes[start]);
  if (length === 0 || start + length > bytes.length) return null;
  try {
    return strictUtf8.decode(bytes.subarray(start, start + length));
  } catch {
    return null;
  }
}

function escape(character) {
  if (character === "\n") return "\\n";
  const code = character.charCodeAt(0);
  return code < 0x20 || code === 0x7f ? `\\x${hex(code)}` : character;
}

const hex = (byte) => byte.toString(16).padStart(2, "0");

/**
 * A transform from the network's chunks to lines, as bytes, each with its newline. A last line
 * without a newline was cut off.
 */
export function lines() {
  let start = []; // of a line that has not ended yet; joined once, not with each chunk
  return new TransformStream({
    transform(chunk, controller) {
      let from = 0;
      for (let end; (end = chunk.indexOf(NEWLINE, from)) >= 0; from = end + 1) {
        const line = chunk.subarray(from, end + 1);
        controller.enqueue(start.length ? join([...start, line]) : line);
        start = [];
      }
      if (from < chunk.length) start.push(chunk.subarray(from));
    },
    flush(controller) {
      if (start.length) controller.enqueue(join(start));
    },
  });
}

function join(chunks) {
  const joined = new Uint8Array(chunks.reduce((sum, chunk) => sum + chunk.length, 0));
  let offset = 0;
  for (const chunk of chunks) {
    joined.set(chunk, offset);
    offset += chunk.length;
  }
  return joined;
}

/** The text of a line, or null if it was cut off. Throws NotAnEvent if it is not UTF-8. */
export function decodeLine(line) {
  if (line.at(-1) !== NEWLINE) return null;
  try {
    return strictUtf8.decode(line.subarray(0, -1));
  } catch {
    throw new NotAnEvent(
      describe(line)
        .map((part) => part.text)
        .join(""),
    );
  }
}

/** Something was sent that is not an event. */
export class NotAnEvent extends Error {
  constructor(text) {
    super(`the server sent something that is not an event: ${text.slice(0, 60)}`);
  }
}

/** The event in a text of JSON. Throws NotAnEvent. */
export function parseEvent(text) {
  let event = null;
  try {
    event = JSON.parse(text);
  } catch {
    // The check below rejects it.
  }
  if (
    Number.isSafeInteger(event?.event_id) &&
    typeof event.data === "string" &&
    typeof event.is_last_event === "boolean"
  ) {
    return event;
  }
  throw new NotAnEvent(text);
}

/**
 * A transform from the lines of an event stream to its messages, { lastEventId, data }, as an
 * EventSource gives them. (It ignores what these streams do not use: `event`, `retry`, and a single
 * carriage return as the end of a line.)
 * https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
 */
export function messages() {
  let lastEventId = "";
  let data = [];
  return new TransformStream({
    transform(bytes, controller) {
      const line = decodeLine(bytes)?.replace(/\r$/, "") ?? null;
      if (line === "") {
        if (data.length) controller.enqueue({ lastEventId, data: data.join("\n") });
        data = [];
        return;
      }
      // A comment starts with a colon, so its field has no name. A line that was cut off is null.
      const [, field, value] = line?.match(/^([^:]*)(?:: ?(.*))?$/s) ?? [];
      if (field === "data") data.push(value ?? "");
      if (field === "id" && !value?.includes("\0")) lastEventId = value ?? "";
    },
  });
}
