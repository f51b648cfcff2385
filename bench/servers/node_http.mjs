// Node's http module: https://nodejs.org/docs/latest-v20.x/api/http.html

import { once } from 'node:events';
import { createServer } from 'node:http';
import { setImmediate, setTimeout } from 'node:timers/promises';

async function stream(request, response) {
  const query = new URL(request.url, 'http://localhost').searchParams;
  const steps = Number(query.get('steps'));
  const interval = Number(query.get('interval'));
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  for (let id = 0; id < steps && !response.destroyed; id++) {
    const data = `Step ${id + 1} of ${steps}: ☕`;
    const event = JSON.stringify({ event_id: id, data, is_last_event: id === steps - 1 });
    if (!response.write(`id: ${id}\nretry: 1000\ndata: ${event}\n\n`)) {
      await Promise.race([once(response, 'drain'), once(response, 'close')]);
    }
    // A timer of 0 ms takes 1 ms in Node.
    await (interval ? setTimeout(interval * 1000) : setImmediate());
  }
  response.end();
}

createServer(stream).listen(Number(process.argv[2]), '127.0.0.1', 2048);
