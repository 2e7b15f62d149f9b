// node kept_probe.mjs REQUEST.json > ANSWER.json; run by tests/runtime/test_web_kept.py. Visits an address with a stand-in for the
// browser's Cache API and answers for each visit with the file's sha256 and the first progress, or with its error.
import { createHash } from 'node:crypto'
import { cpSync, readFileSync } from 'node:fs'
import { pathToFileURL } from 'node:url'

const { web, address, visits } = JSON.parse(readFileSync(process.argv[2], 'utf-8'))
const { kept } = await import(pathToFileURL(`${web}/kept.mjs`))
const entries = new Map()

function storage({ room = Infinity, refused = false }) {
  const used = () => [...entries.values()].reduce((total, bytes) => total + bytes.length, 0)
  const cache = {
    keys: async () => [...entries.keys()].map(url => new Request(url)),
    match: async url => entries.has(url) ? new Response(entries.get(url)) : undefined,
    delete: async request => entries.delete(request.url ?? request),
    async put(url, response) {
      const bytes = new Uint8Array(await response.arrayBuffer())
      if (used() + bytes.length > room) throw new DOMException('no room', 'QuotaExceededError')
      entries.set(url, bytes)
    },
  }
  return { async open() { if (refused) throw new DOMException('refused', 'SecurityError'); return cache } }
}

const answers = []
for (const { file, store, damage, forget, publish } of visits) {
  if (publish) cpSync(...publish, { recursive: true })
  if (damage) for (const bytes of entries.values()) bytes[0] ^= 1
  Object.defineProperty(globalThis, 'caches', { configurable: true, get() { if (store.hidden) throw new DOMException('hidden', 'SecurityError'); return storage(store) } })
  const reports = []
  try {
    const source = await kept(address), bytes = await source.read(file, done => reports.push(done))
    if (forget) await source.forget(file)
    answers.push({ sha256: createHash('sha256').update(bytes).digest('hex'), first: reports[0], last: reports.at(-1), entries: entries.size })
  } catch (error) {
    answers.push({ error: error.message, entries: entries.size })
  }
}
process.stdout.write(JSON.stringify(answers))
