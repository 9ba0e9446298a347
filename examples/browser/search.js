// Search over sentences that are typed in: the model, the sentences and the search are all in this tab.
import { pipeline, env } from "/modules/@huggingface/transformers/dist/transformers.min.js";

const SENTENCES = `I forgot my password and cannot sign in.
The invoice for last month is still missing.
You can reset your login details on the settings page.
Our parcel arrived with a broken lid.
The train to the coast leaves at half past seven.
She plays the violin in a small orchestra.
A good risotto needs patience and warm stock.
Refunds are paid within fourteen days.
The cat sleeps on the warm windowsill all morning.
Bees find their way by the position of the sun.
He repaired the old bicycle in an afternoon.
The museum is closed on Mondays.
Heavy rain is expected in the north tonight.
Ich habe mein Kennwort vergessen und komme nicht mehr hinein.
La facture du mois dernier manque toujours.
Las abejas encuentran el camino por la posición del sol.`;
const SHOWN = 7;
const BATCH = 8; // sentences that are encoded at a time, so that the page stays awake
const element = (id) => document.getElementById(id);
const options = new URLSearchParams(location.search);
const known = new Map(); // the vectors of sentences that were encoded before
let pipe;
let prefix = { query: "", text: "" };

// Everything comes from the machine that this page is from.
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "/models/";
env.useBrowserCache = false;
env.backends.onnx.wasm.wasmPaths = "/modules/onnxruntime-web/dist/";
env.backends.onnx.wasm.numThreads = Number(options.get("threads") ?? 0) || undefined;

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const milliseconds = (time) => (time < 1000 ? `${time.toFixed(0)} ms` : `${(time / 1000).toFixed(1)} s`);

async function load() {
  const about = await (await fetch("/about.json")).json();
  const smallest = about.files.reduce((one, other) => (other.bytes < one.bytes ? other : one));
  const file = about.files.find((each) => each.dtype === options.get("dtype")) ?? smallest;
  element("name").textContent = about.name;
  element("size").textContent = megabytes(file.bytes);
  // E5 models were trained with a word before each text.
  if (/\be5\b/i.test(about.name)) prefix = { query: "query: ", text: "passage: " };

  const progress = ({ status, loaded, total, file: name }) => {
    if (status === "progress" && name.endsWith(".onnx") && total) {
      element("bar").firstElementChild.style.width = `${(100 * loaded) / total}%`;
    }
  };
  const start = performance.now();
  pipe = await pipeline("feature-extraction", about.model, {
    dtype: file.dtype, device: "wasm", progress_callback: progress,
  });
  return performance.now() - start;
}

// The vectors of texts, each of length 1.
async function embed(texts) {
  const vectors = [];
  for (let first = 0; first < texts.length; first += BATCH) {
    const part = await pipe(texts.slice(first, first + BATCH), { pooling: "mean", normalize: true });
    vectors.push(...part.tolist());
  }
  return vectors;
}

async function search() {
  const texts = [...new Set(element("texts").value.split("\n").map((line) => line.trim()).filter(Boolean))];
  const query = element("query").value.trim();
  element("count").textContent = `${texts.length} sentences`;
  if (!query || !texts.length) return show([]);

  const unknown = texts.filter((text) => !known.has(text));
  const vectors = await embed(unknown.map((text) => prefix.text + text));
  unknown.forEach((text, number) => known.set(text, vectors[number]));

  const start = performance.now();
  const [wanted] = await embed([prefix.query + query]);
  const found = texts.map((text) => ({ text, score: known.get(text).reduce((sum, x, i) => sum + x * wanted[i], 0) }));
  found.sort((one, other) => other.score - one.score);
  element("time").textContent = milliseconds(performance.now() - start);
  return show(found.slice(0, SHOWN), found.at(-1).score);
}

// Bars begin at the least similar of all sentences: of some models, even that is far from 0.
function show(found, least = 0) {
  const items = found.map(({ text, score }) => {
    const item = document.createElement("li");
    const [value, line] = [document.createElement("b"), document.createElement("i")];
    value.textContent = score.toFixed(2);
    line.style.width = `${(100 * (score - least)) / Math.max(1e-6, 1 - least)}%`;
    item.append(text, value, line);
    return item;
  });
  if (!items.length) return message("Type something to look for, and sentences to look in.");
  element("results").replaceChildren(...items);
}

function message(text) {
  const item = document.createElement("li");
  item.className = "message";
  item.textContent = text;
  element("results").replaceChildren(item);
}

// One search at a time; what is typed meanwhile is searched for next.
let running = false;
let again = false;
async function update() {
  again = true;
  if (running) return;
  running = true;
  try {
    while (again) {
      again = false;
      await search();
    }
  } catch (error) {
    message(String(error));
  } finally {
    running = false;
  }
}

element("texts").value = SENTENCES;
message("The model is loading.");
try {
  const time = await load();
  element("load").textContent = milliseconds(time);
  element("bar").classList.add("done");
  element("query").disabled = false;
  await update();
  for (const id of ["query", "texts"]) element(id).addEventListener("input", update);
  window.model = { embed, load: time }; // for the console, and for tests
} catch (error) {
  element("bar").classList.add("failed");
  message(`The model does not load: ${error}`);
  window.model = { error: String(error?.stack ?? error) };
}
