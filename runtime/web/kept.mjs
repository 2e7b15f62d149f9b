/** Files of an exported folder that the browser keeps, and downloads that go on where they were cut off. Imported by dmpt.mjs. */

import { begun, DmptError, fetched, parsed } from './folder.mjs'

const STORE = 'dmpt-export' // the name of the cache
const PIECE = 4 << 20 // bytes; what a cut costs at most

/**
 * As opened() of folder.mjs, with a copy of each file in the browser's Cache API: one entry for each piece, under the file's sha256
 * and the piece's first byte. Without storage (no https, refused, full) files are downloaded and not kept.
 * @param {string} folder an address
 */
export async function kept(folder) {
  const base = folder.replace(/\/$/, ''), manifest = await fetched(`${base}/dmpt_manifest.json`)
  const files = parsed(manifest, 'dmpt_manifest.json').files ?? {}
  const scope = new URL('kept/', new URL(`${base}/`, globalThis.location?.href)).href // nothing lies there: names of entries
  let store = await (async () => globalThis.caches?.open(STORE))().catch(() => null) // even asking for it may be refused
  const entry = (name, at) => `${scope}${files[name].sha256}/${at}`
  const wanted = Object.keys(files).map(name => entry(name, ''))
  await clear(url => url.startsWith(scope) && !wanted.some(start => url.startsWith(start))) // of models that were here before

  async function clear(which) {
    try {
      for (const { url } of await store?.keys() ?? []) if (which(url)) await store.delete(url)
    } catch { store = null }
  }

  /** Copies the pieces that are kept into `bytes`; how many bytes they have. */
  async function recall(name, bytes, report) {
    let at = 0
    try {
      for (let piece; at < bytes.length && (piece = await store?.match(entry(name, at))); report(at)) {
        const part = new Uint8Array(await piece.arrayBuffer())
        if (part.length !== Math.min(PIECE, bytes.length - at)) break
        bytes.set(part, at)
        at += part.length
      }
    } catch { store = null }
    return at
  }

  async function keep(name, bytes, from, to) {
    await store?.put(entry(name, from), new Response(bytes.slice(from, to))).catch(() => { store = null }) // no room
  }

  async function read(name, report = () => {}) {
    if (name === 'dmpt_manifest.json') return manifest
    const bytes = new Uint8Array(files[name].size), have = await recall(name, bytes, report)
    if (have === bytes.length) return bytes
    const { body, start } = await begun(`${base}/${name}`, have, store ? 'no-store' : 'no-cache') // not kept twice
    let at = start, stored = start
    for (const reader = body.getReader(); ;) {
      const { done, value } = await reader.read().catch(() => ({ done: true })) // a lost connection
      if (done) break
      if (at + value.length > bytes.length) throw new DmptError(`${name} is longer than ${bytes.length} bytes: load or copy the folder again`)
      bytes.set(value, at)
      report(at += value.length)
      for (; at - stored >= PIECE; stored += PIECE) await keep(name, bytes, stored, stored + PIECE)
    }
    if (at < bytes.length) throw new DmptError(`the download of ${name} was cut off after ${at} of ${bytes.length} bytes: load it again, and it goes on from there`)
    if (stored < at) await keep(name, bytes, stored, at)
    return bytes
  }

  return { read, forget: name => clear(url => url.startsWith(entry(name, ''))) }
}
