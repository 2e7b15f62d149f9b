// node --experimental-websocket browser.mjs REQUEST.json > ANSWER.json; run by tests/runtime/test_web_browser.py.
// Drives one headless Chromium through its DevTools protocol. Each visit opens a tab, runs `before` ahead of the page's scripts, goes
// to `address`, and takes its steps: {until: expression} waits, {take: expression} adds a value to the answer. The tab is closed then.
import { spawn } from 'node:child_process'
import { readFileSync } from 'node:fs'

const { chromium, profile, flags = [], visits, seconds = 60 } = JSON.parse(readFileSync(process.argv[2], 'utf-8'))
const browser = spawn(chromium, ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run',
  '--disable-background-networking', '--disable-component-update', `--user-data-dir=${profile}`, '--remote-debugging-port=0', ...flags, 'about:blank'])
const pending = new Map(), complaints = []
let last = 0, socket

async function devtools() {
  let heard = ''
  for await (const part of browser.stderr) {
    heard += part
    const found = /DevTools listening on (ws:\S+)/.exec(heard)
    if (found) return found[1]
  }
  throw new Error(`Chromium does not start: ${heard}`)
}

function send(method, params = {}, sessionId = undefined) {
  const id = ++last
  socket.send(JSON.stringify({ id, method, params, sessionId }))
  return new Promise((resolve, reject) => pending.set(id, { resolve, reject }))
}

function hear({ data }) {
  const { id, result, error, method, params } = JSON.parse(data)
  if (method === 'Runtime.exceptionThrown') complaints.push(params.exceptionDetails.exception?.description ?? params.exceptionDetails.text)
  if (method === 'Runtime.consoleAPICalled') complaints.push(params.args.map(value => value.value ?? value.description).join(' '))
  if (error) pending.get(id).reject(new Error(error.message))
  else pending.get(id)?.resolve(result)
}

async function visited({ address, before, steps }) {
  const { targetId } = await send('Target.createTarget', { url: 'about:blank' })
  const { sessionId } = await send('Target.attachToTarget', { targetId, flatten: true }), taken = []
  const evaluate = async expression => {
    const { result, exceptionDetails } = await send('Runtime.evaluate', { expression, returnByValue: true, awaitPromise: true }, sessionId)
    if (exceptionDetails) throw new Error(`${expression}: ${exceptionDetails.exception?.description}`)
    return result.value
  }
  await send('Page.enable', {}, sessionId)
  await send('Runtime.enable', {}, sessionId)
  if (before) await send('Page.addScriptToEvaluateOnNewDocument', { source: before }, sessionId)
  await send('Page.navigate', { url: address }, sessionId)
  for (const { until, take } of [{ until: "document.readyState === 'complete'" }, ...steps]) {
    if (take) { taken.push(await evaluate(take)); continue }
    const end = Date.now() + seconds * 1000
    while (!(await evaluate(until))) {
      if (Date.now() > end) throw new Error(`not within ${seconds} s: ${until}; the page says: ${await evaluate('document.body.innerText')}`)
      await new Promise(resolve => setTimeout(resolve, 100))
    }
  }
  await send('Target.closeTarget', { targetId })
  return taken
}

let failed = 0
try {
  socket = new WebSocket(await devtools())
  socket.onmessage = hear
  await new Promise((resolve, reject) => { socket.onopen = resolve; socket.onerror = reject })
  const answers = []
  for (const visit of visits) answers.push(await visited(visit))
  process.stdout.write(JSON.stringify(answers))
} catch (error) {
  process.stderr.write([error.message, ...complaints].join('\n'))
  failed = 1
} finally {
  if (socket) send('Browser.close').catch(() => {})
  const late = setTimeout(() => browser.kill('SIGKILL'), 5000)
  await new Promise(resolve => browser.once('exit', resolve))
  clearTimeout(late)
}
process.exit(failed)
