// Opens the search page in Chromium, and prints what it finds as JSON.
// usage: node browser.mjs NODE_MODULES URL TEXTS.json [SCREENSHOT.png]
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

const [modules, url, texts, screenshot] = process.argv.slice(2);
const { chromium } = createRequire(`${modules}/`)("playwright-core");
const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
const browser = await chromium.launch({
  executablePath,
  args: ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"],
});
try {
  const page = await browser.newPage({ viewport: { width: 1120, height: 860 }, deviceScaleFactor: 2 });
  const requests = [], errors = [];
  page.on("request", (request) => requests.push(request.url()));
  page.on("console", (line) => line.type() === "error" && errors.push(line.text()));
  await page.goto(url);
  await page.waitForFunction("window.model", null, { timeout: 570_000 });

  const failed = await page.evaluate("window.model.error");
  if (failed) throw new Error(`${failed}\n${errors.join("\n")}`);
  const results = await page.locator("#results li").allTextContents();
  const vectors = await page.evaluate((given) => window.model.embed(given), JSON.parse(readFileSync(texts, "utf8")));

  const timed = await page.evaluate(async () => {
    const times = [];
    for (let turn = 0; turn < 20; turn++) {
      const start = performance.now();
      await window.model.embed(["A group of men play soccer on the beach."]);
      times.push(performance.now() - start);
    }
    return { load: window.model.load, latency: Math.min(...times), isolated: crossOriginIsolated };
  });
  const patience = new Promise((resolve) => setTimeout(() => resolve(null), 60_000));
  const memory = process.env.MEMORY
    ? await Promise.race([page.evaluate(async () => (await performance.measureUserAgentSpecificMemory()).bytes), patience])
    : null;
  if (screenshot) await page.screenshot({ path: screenshot });
  console.log(JSON.stringify({ vectors, results, requests, errors, memory, ...timed }));
} finally {
  await browser.close();
}
