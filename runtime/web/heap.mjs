/**
 * Caches inside the wasm heap of onnxruntime-web, where a run reads and writes them in place. Imported by dmpt.mjs.
 *
 * Through its public API every run copies each input into the heap and each output out of it. Here the module's C functions are
 * called instead, as onnxruntime-web's own wasm-core-impl.ts calls them. They are not public and may change with any version, so
 * a trial on a graph of two operators decides: where anything differs, open() gives null and caches are copied as before.
 */

const BRIDGE = Symbol.for('dmpt-runtime.bridge') // the bridge's own module finds this one by it
const FUNCTIONS = ['_malloc', '_free', '_OrtCreateTensor', '_OrtReleaseTensor', '_OrtGetTensorData', '_OrtFree', '_OrtRun', '_OrtGetLastError',
  'getValue', 'setValue', 'UTF8ToString', 'stackSave', 'stackAlloc', 'stackRestore']
const TYPES = { float32: [1, Float32Array], int8: [3, Int8Array], int32: [6, Int32Array], int64: [7, BigInt64Array], bool: [9, Uint8Array] }
const BY_NUMBER = Object.fromEntries(Object.entries(TYPES).map(([name, [number, array]]) => [number, [name, array]]))
const CPU = 1 // a tensor's place
const TRIAL = 'CAg6XAoQCgF4CgF4EgF5IgNBZGQ6AAoPCgF4EgF6IgVTaGFwZToAEgFnWhAKAXgSCwoJCAESBQoDEgFuYhAKAXkSCwoJCAESBQoDEgFuYhAKAXoSCwoJCAcSBQoDEgFyQgQKABAN' // y = Add(x, x), z = Shape(x)

/**
 * Make onnxruntime-web's wasm module reachable; call it before the first session is made.
 * @param {any} ort @param {string} factory address of its file ort-wasm-simd-threaded.mjs, beside the .wasm file
 */
export async function reach(ort, factory) {
  const bridge = `data:text/javascript,export default options => globalThis[Symbol.for('${BRIDGE.description}')].start(options)`
  try {
    const address = new URL(factory, globalThis.location?.href).href
    const { default: start } = await import(/* webpackIgnore: true */ /* @vite-ignore */ address)
    await import(/* webpackIgnore: true */ /* @vite-ignore */ bridge) // a page's security policy may refuse it
    globalThis[BRIDGE] ??= { async start(options) { return this.module = await start(options) } }
    ort.env.wasm.wasmPaths = { mjs: bridge, wasm: ort.env.wasm.wasmPaths?.wasm ?? address.replace(/\.mjs$/, '.wasm') }
  } catch { /* the public way needs nothing of this */ }
}

/** The heap of a session, or null where it cannot be used. */
export async function open(ort, session) {
  const module = globalThis[BRIDGE]?.module
  if (!module || module.PTR_SIZE !== 4 || FUNCTIONS.some(name => typeof module[name] !== 'function')) return null
  let trial
  try {
    trial = await ort.InferenceSession.create(Uint8Array.from(atob(TRIAL), character => character.charCodeAt(0)))
    return await works(new Heap(module, trial)) && Number.isInteger(session.handler.sessionId) ? new Heap(module, session) : null
  } catch {
    return null
  } finally { await trial?.release() }
}

/** Whether a run reads a tensor of the heap, writes it in place, and returns another one. */
async function works(heap) {
  const x = heap.tensor('float32', [3])
  try {
    x.data.set([1, 2, 4])
    const { z } = await heap.run({ x }, { y: x, z: null })
    return String(x.data) === '2,4,8' && z.type === 'int64' && String(z.dims) === '1' && String(z.data) === '3'
  } finally {
    x.dispose()
    heap.dispose()
  }
}

/** A tensor that lives in the heap until dispose(), or until nothing refers to it. */
class HeapTensor {
  constructor(heap, type, dims) {
    const [, array] = TYPES[type], count = dims.reduce((a, b) => a * b, 1), size = count * array.BYTES_PER_ELEMENT
    const at = heap.take(size)
    heap.bytes(at, size).fill(0)
    Object.assign(this, { heap, type, dims, count, at, handle: heap.create(type, at, size, dims) })
    heap.registry.register(this, [this.handle, at], this)
  }

  /** Its numbers, for now: the heap moves when it grows. */
  get data() {
    this.heap.module.getValue(this.at, 'i8') // renews the module's views of a heap that has grown
    return new TYPES[this.type][1](this.heap.module.HEAPU8.buffer, this.at, this.count)
  }

  dispose() {
    if (!this.handle) return
    this.heap.registry.unregister(this)
    this.heap.release([this.handle, this.at])
    this.handle = 0
  }
}

class Heap {
  constructor(module, session) {
    Object.assign(this, { module, session: session.handler.sessionId, names: new Map() })
    this.registry = new FinalizationRegistry(held => this.release(held))
  }

  tensor(type, dims) { return new HeapTensor(this, type, dims) }

  release([handle, at]) {
    this.module._OrtReleaseTensor(handle)
    this.module._free(at)
  }

  /** Frees the names; tensors have a dispose() of their own. */
  dispose() {
    for (const at of this.names.values()) this.module._free(at)
    this.names.clear()
  }

  take(size) {
    const at = this.module._malloc(Math.max(1, size))
    if (!at) throw new Error(`the browser gives WebAssembly no ${size} bytes more: use a smaller model or a shorter text`)
    return at
  }

  bytes(at, size) {
    this.module.getValue(at, 'i8')
    return this.module.HEAPU8.subarray(at, at + size)
  }

  create(type, at, size, dims) {
    const { module } = this, stack = module.stackSave(), list = module.stackAlloc(4 * Math.max(1, dims.length))
    dims.forEach((length, i) => module.setValue(list + 4 * i, length, 'i32'))
    const handle = module._OrtCreateTensor(TYPES[type][0], at, size, list, dims.length, CPU)
    module.stackRestore(stack)
    return handle || this.fail()
  }

  name(text) {
    if (!this.names.has(text)) {
      const bytes = new TextEncoder().encode(`${text}\0`), at = this.take(bytes.length)
      this.bytes(at, bytes.length).set(bytes)
      this.names.set(text, at)
    }
    return this.names.get(text)
  }

  fail() {
    const { module } = this, stack = module.stackSave(), at = module.stackAlloc(8)
    module._OrtGetLastError(at, at + 4)
    const text = module.getValue(at + 4, '*'), message = text ? module.UTF8ToString(text) : 'unknown error'
    module.stackRestore(stack)
    throw new Error(message)
  }

  /**
   * As session.run: tensors of the heap are read where they lie, others are copied in; outputs go into the tensor of the heap that
   * `fetches` has for them, or are copied out where it has null.
   */
  async run(feeds, fetches) {
    const { module } = this, inputs = Object.entries(feeds), outputs = Object.entries(fetches), mine = [], results = {}
    const lists = this.take(8 * (inputs.length + outputs.length))
    const [values, names, outValues, outNames] = [0, inputs.length, 2 * inputs.length, 2 * inputs.length + outputs.length].map(n => lists + 4 * n)
    try {
      inputs.forEach(([name, feed], i) => {
        module.setValue(values + 4 * i, feed.handle ?? this.copied(feed, mine), '*')
        module.setValue(names + 4 * i, this.name(name), '*')
      })
      outputs.forEach(([name, tensor], i) => {
        module.setValue(outValues + 4 * i, tensor?.handle ?? 0, '*')
        module.setValue(outNames + 4 * i, this.name(name), '*')
      })
      if (await module._OrtRun(this.session, names, values, inputs.length, outNames, outputs.length, outValues, 0)) this.fail()
      outputs.forEach(([name, tensor], i) => { results[name] = tensor ?? this.read(module.getValue(outValues + 4 * i, '*')) })
      return results
    } finally {
      for (const held of mine) this.release(held)
      module._free(lists)
    }
  }

  copied({ type, data, dims }, mine) {
    const at = this.take(data.byteLength)
    this.bytes(at, data.byteLength).set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength))
    const handle = this.create(type, at, data.byteLength, dims)
    mine.push([handle, at])
    return handle
  }

  read(handle) {
    const { module } = this, stack = module.stackSave(), info = module.stackAlloc(16)
    try {
      if (module._OrtGetTensorData(handle, info, info + 4, info + 8, info + 12)) this.fail()
      const [number, at, list, rank] = [0, 4, 8, 12].map(offset => module.getValue(info + offset, '*'))
      const dims = Array.from({ length: rank }, (_, i) => module.getValue(list + 4 * i, 'i32'))
      module._OrtFree(list)
      const [type, array] = BY_NUMBER[number]
      return { type, dims, data: new array(module.HEAPU8.buffer, at, dims.reduce((a, b) => a * b, 1)).slice() }
    } finally {
      module.stackRestore(stack)
      module._OrtReleaseTensor(handle)
    }
  }
}
