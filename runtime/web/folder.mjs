/** Reading and checking the files of an exported folder, as runtime/manifest_file.py and runtime/files.py. */

const FORMAT = 'dmpt-onnx', FORMAT_VERSION = 2, STANDARD = 'dmpt-onnx-standard'

/** A folder, setting or request that cannot be used; `message` says what to do. */
export class DmptError extends Error {}

/** Whether the folder lies on this computer: in Node, unless it is an address. */
export function isLocal(folder) { return typeof process === 'object' && Boolean(process.versions?.node) && !/^https?:/.test(folder) }

/** How the files of a folder are read: from a path in Node, else from an address. */
export async function opened(folder) {
  if (!isLocal(folder)) return { read: (name, report) => fetched(`${folder.replace(/\/$/, '')}/${name}`, report) }
  const { readFile } = await import('node:fs/promises'), { fileURLToPath } = await import('node:url')
  const path = folder.startsWith('file:') ? fileURLToPath(folder) : folder
  return { path, read: name => readFile(`${path}/${name}`).catch(error => { throw unreadable(path, name, error) }) }
}

function unreadable(path, name, error) {
  return new DmptError(`${path}/${name} cannot be read (${error.code ?? error.message}): give the folder that dmpt-export onnx made`)
}

/**
 * A download that begins at byte `from`, or at 0 where the server gives whole files only.
 * @param {string} address @param {number} [from] @param {RequestCache} [cache] 'no-cache': the browser asks the server whether its
 *   copy is the latest; without it, a changed model would be mixed with files of the old one
 */
export async function begun(address, from = 0, cache = 'no-cache') {
  const response = await fetch(address, { cache, ...(from ? { headers: { Range: `bytes=${from}-` } } : {}) }).catch(error => {
    throw new DmptError(`${address} cannot be loaded (${error.cause?.code ?? error.message}): check the address and the connection`)
  })
  if (from && response.status === 416) return begun(address, 0, cache)
  if (!response.ok) throw new DmptError(`${address}: ${response.status} ${response.statusText}`)
  if (!from || response.status !== 206) return { body: response.body, start: 0 }
  const first = /^bytes (\d+)-/.exec(response.headers.get('Content-Range'))?.[1]
  return Number(first) === from ? { body: response.body, start: from } : begun(address, 0, cache)
}

export async function fetched(address, report = () => {}) {
  const { body } = await begun(address), parts = []
  let size = 0
  for (const reader = body.getReader(); ;) {
    const { done, value } = await reader.read().catch(() => { throw new DmptError(`the download of ${address} was cut off after ${size} bytes: load it again`) })
    if (done) break
    parts.push(value)
    report(size += value.length)
  }
  const bytes = new Uint8Array(size)
  for (let at = 0; parts.length;) { const part = parts.shift(); bytes.set(part, at); at += part.length }
  return bytes
}

export function parsed(bytes, name) {
  try {
    return JSON.parse(new TextDecoder().decode(bytes))
  } catch (error) {
    throw new DmptError(`${name} is not JSON (${error.message}): export the model again`)
  }
}

/** @param {boolean} inMemory the files are handed over as bytes, as in a browser */
export function checked(manifest, inMemory = false) {
  if (manifest.format === STANDARD) throw new DmptError('this export has the standard layout, for transformers.js: open it there, or export the checkpoint without --layout standard')
  if (manifest.format !== FORMAT || manifest.format_version !== FORMAT_VERSION) throw new DmptError(`this program reads ${FORMAT}, ${FORMAT_VERSION}; the folder has ${manifest.format}, ${manifest.format_version}`)
  if (manifest.activation_dtype !== 'float32') throw new DmptError('this export is for CUDA: export it with --target web')
  if (inMemory && !manifest.branches_inline && manifest.tree.length > 1 && Object.entries(manifest.quantization.tensors).some(([name, form]) => form.block && form.scheme !== 'int8-dynamic' && name.startsWith('paths.'))) {
    throw new DmptError('an earlier dmpt-export made this folder, with scales where browsers cannot read them: export the model again')
  }
  return manifest
}

/** Size and sha256 of a file that was read, or that lies in the folder. */
export async function compare(name, bytes, path, want, verify) {
  let size = bytes?.length, digest
  if (path && !bytes) {
    const { createReadStream } = await import('node:fs'), { createHash } = await import('node:crypto'), hash = createHash('sha256')
    size = 0
    try {
      if (verify) for await (const part of createReadStream(`${path}/${name}`)) { size += part.length; hash.update(part) }
      else size = (await (await import('node:fs/promises')).stat(`${path}/${name}`)).size
    } catch (error) { throw unreadable(path, name, error) }
    digest = hash.digest('hex')
  } else if (verify && globalThis.crypto?.subtle) { // absent on pages without https
    digest = [...new Uint8Array(await crypto.subtle.digest('SHA-256', bytes))].map(b => b.toString(16).padStart(2, '0')).join('')
  }
  if (size !== want.size) throw new DmptError(`${name} has ${size} bytes, expected ${want.size}: load or copy the folder again`)
  if (verify && digest && digest !== want.sha256) throw new DmptError(`${name} has a different sha256 than its manifest: load or copy the folder again`)
}
