// Runs an exported folder in transformers.js on Node, and prints the vectors of texts as JSON.
// usage: node node.mjs NODE_MODULES FOLDER DTYPE TEXTS.json
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { basename, dirname, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [modules, folder, dtype, texts] = process.argv.slice(2);
const found = createRequire(`${modules}/`).resolve("@huggingface/transformers");
const { pipeline, env } = await import(pathToFileURL(found));
env.allowRemoteModels = false;
env.localModelPath = `${dirname(resolve(folder))}/`;
env.useFSCache = false;

const pipe = await pipeline("feature-extraction", basename(resolve(folder)), { dtype, device: "cpu" });
const answer = await pipe(JSON.parse(readFileSync(texts, "utf8")), { pooling: "mean", normalize: true });
console.log(JSON.stringify(answer.tolist()));
