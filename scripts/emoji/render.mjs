// Renders a JSON list of [svg, size, mode, file] from a file, from an index on; prints each index before it starts.
import { readFileSync, writeFileSync, writeSync } from "node:fs";
import { Resvg } from "@resvg/resvg-js";

const [jobs, start] = process.argv.slice(2);
const list = JSON.parse(readFileSync(jobs));
for (let i = Number(start); i < list.length; i += 1) {
  const { svg, size, mode, file } = list[i];
  writeSync(1, `${i}\n`);
  writeFileSync(file, new Resvg(svg, { fitTo: { mode, value: size }, font: { loadSystemFonts: false } }).render().asPng());
}
