// Renders the icon sets at 64 px and writes captions: node build.mjs [--out DIR] [--no-images]
import { spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, relative } from "node:path";
import { CLASSES, EVAL_SETS, TRAIN_SETS, chance, isHeldOut, loadIcons, words } from "./concepts.mjs";

const SIZE = 64;
const MAX_WORDS = 18;
const imageOf = ({ set, slug }) => `img/${set}/${slug}.png`;
const argument = (flag, fallback) => { const i = process.argv.indexOf(flag); return i < 0 ? fallback : process.argv[i + 1]; };
const out = argument("--out", new URL("../../data/emoji", import.meta.url).pathname);

const NAME_FORMS = ["an icon of {}", "an emoji of a {}", "a drawing of a {}", "a picture of a {}", "{} icon", "a symbol of a {}", "an image of a {}"];
const pick = (list, ...key) => list[Math.floor(chance(...key) * list.length)];
const fill = (form, text) => form.replace("{}", text);
const shuffled = (list, ...key) => [...list].sort((a, b) => chance(...key, a) - chance(...key, b));

/**
 * Captions of one image: about a third name only, a third the class (in the adaptation prompts' words), a third both or keywords.
 * The class alone has two wordings for all images, so that in a batch it belongs to every picture of its kind.
 */
function captions({ set, slug, plain, concept }) {
  const key = [set, slug];
  const { name, keywords } = concept;
  const kind = CLASSES[concept.subcategory];
  const few = shuffled(keywords, "keywords", ...key);
  const other = pick([words(plain).replace(/^flag for /, "flag "), name, ...concept.aliases], "alias", ...key);
  const list = [name, `an icon of a ${name}`, fill(pick(NAME_FORMS, "name", ...key), name), fill(pick(NAME_FORMS, "alias form", ...key), other)];
  if (few.length > 1) {
    list.push(`${name}, ${few.slice(0, 3).join(", ")}`, few.slice(0, 4).join(", "));
    list.push(`an icon of ${few.slice(-3).join(", ")}`);
  }
  if (kind) {
    list.push(`an icon of a ${kind}`, kind, `${name}, a ${kind}`);
    list.push(few.length ? `a ${kind}, ${few.slice(0, 2).join(", ")}` : `a ${kind} called ${name}`);
  }
  return list.map((text) => text.split(" ").slice(0, MAX_WORDS).join(" ").replace(/,$/, ""));
}

// resvg aborts the process on the few icons that hide translucent artwork outside their view box, so it runs in a
// child that is restarted behind each of them. Returns the files that could not be made.
function render(list) {
  const scratch = mkdtempSync(join(tmpdir(), "emoji-"));
  const file = join(scratch, "jobs.json");
  writeFileSync(file, JSON.stringify(list));
  const failed = [];
  for (let start = 0; start < list.length;) {
    const child = spawnSync(process.execPath, [new URL("render.mjs", import.meta.url).pathname, file, `${start}`], { encoding: "utf8", maxBuffer: 1 << 26 });
    if (child.status === 0) break;
    const last = child.stdout.trim().split("\n").pop();
    if (last === "") throw new Error(child.stderr);
    failed.push(list[Number(last)].file);
    start = Number(last) + 1;
  }
  rmSync(scratch, { recursive: true });
  return new Set(failed);
}

function renderAll(icons) {
  for (const set of [...TRAIN_SETS, ...EVAL_SETS]) mkdirSync(join(out, "img", set), { recursive: true });
  return render(icons.map(({ svg, tall, ...icon }) => ({ svg, size: SIZE, mode: tall ? "height" : "width", file: join(out, imageOf(icon)) })));
}

const { icons, counts } = loadIcons();
const failed = process.argv.includes("--no-images") ? new Set() : renderAll(icons);
const rows = { train: [], val: [], eval: [] };
const heldOut = new Map();
for (const icon of icons) {
  const image = imageOf(icon);
  if (failed.has(join(out, image))) continue;
  const held = isHeldOut(icon.group);
  if (held) heldOut.set(icon.group, [...new Set([...(heldOut.get(icon.group) ?? []), icon.concept.name])]);
  const kind = CLASSES[icon.concept.subcategory] ?? null;
  if (EVAL_SETS.includes(icon.set)) {
    const { name, subcategory } = icon.concept;
    rows.eval.push({ image, set: icon.set, id: icon.slug, name, group: icon.group, subcategory, class: kind, heldout: held });
  } else {
    counts[icon.set][held ? "val" : "train"] = (counts[icon.set][held ? "val" : "train"] ?? 0) + 1;
    rows[held ? "val" : "train"].push({ image, text: captions(icon), group: icon.group, class: kind });
  }
}
mkdirSync(out, { recursive: true });
for (const [name, list] of Object.entries(rows)) {
  writeFileSync(join(out, `${name}.jsonl`), list.map((row) => JSON.stringify(row) + "\n").join(""));
}
const held = [...heldOut].sort().map(([group, names]) => `${group}\t${names.join(", ")}\n`);
writeFileSync(new URL("heldout.txt", import.meta.url), held.join(""));
const groups = new Set(rows.train.map((r) => r.group)).size;
console.log(JSON.stringify({ train: rows.train.length, val: rows.val.length, groups, not_rendered: [...failed].map((file) => relative(out, file)), held_out_groups: held.length, training_styles: TRAIN_SETS, sets: counts }, null, 1));
