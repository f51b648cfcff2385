// Reads an SSE stream with the `eventsource` package: prints a line of JSON for each event, and one
// when the source has stopped by itself. Run it with `node eventsource.mjs URL`.
import { EventSource } from 'eventsource'

const source = new EventSource(process.argv[2])
const stayAlive = setInterval(() => {}, 1000) // Node would exit while the source waits to reconnect
source.onmessage = (message) => console.log(message.data)
source.onerror = (error) => {
  if (source.readyState !== EventSource.CLOSED) return // it reconnects
  console.log(JSON.stringify({ closed_by: error.code }))
  clearInterval(stayAlive)
}
