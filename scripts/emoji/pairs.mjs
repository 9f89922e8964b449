// Images with texts, questions and answers from the icons of build.mjs, in all styles: node pairs.mjs [--data DIR] [--out DIR]
//
//   pairs.jsonl   image, texts (name, other names, keywords), label (kind), labels (keywords), group     → retrieve, classify
//   match.jsonl   image, one text, fits: half of the texts are of another concept, half of those of the same kind → match
//   answer.jsonl  image, question, answer, choices where the question has its own                         → answer
//
// Paths are relative to the table, as data.table reads them. All styles of a concept are in one split: the concepts that
// the embedded base has never seen (heldout.txt) are the test split, a seeded tenth of the others validates.
import { existsSync, mkdirSync, writeFileSync } from "node:fs";
import { join, relative } from "node:path";
import { CLASSES, chance, isHeldOut, loadIcons } from "./concepts.mjs";

const argument = (flag, fallback) => { const i = process.argv.indexOf(flag); return i < 0 ? fallback : process.argv[i + 1]; };
const data = argument("--data", new URL("../../data/emoji", import.meta.url).pathname);
const out = argument("--out", new URL("../../data/emoji-pairs", import.meta.url).pathname);

const splitOf = (group) => isHeldOut(group) ? "test" : chance("pairs split", group) < 0.1 ? "val" : "train";
const pick = (list, ...key) => list[Math.floor(chance(...key) * list.length)];
const article = (text) => `${/^[aeiou]/.test(text) ? "an" : "a"} ${text}`;

/** What is asked about a kind of icon; the kind answers. Kinds with one question share its answers. */
const QUESTIONS = [
  [/^animal-/, "what kind of animal is this?"],
  [/^plant-/, "what kind of plant is this?"],
  [/^(food-|drink)/, "what kind of food or drink is this?"],
  [/^(face-|cat-face|monkey-face)/, "what kind of face is this?"],
  [/^(person|family)/, "what kind of person is this?"],
  [/^(hand|hands)/, "what kind of hand sign is this?"],
  [/^transport-(ground|water|air)/, "what kind of vehicle is this?"],
  [/^place-/, "what kind of place is this?"],
];
const questionOf = (subcategory) => QUESTIONS.find(([pattern]) => pattern.test(subcategory))?.[1] ?? "what kind of thing is this?";

const icons = loadIcons().icons.filter(({ set, slug }) => existsSync(join(data, "img", set, `${slug}.png`)));
if (icons.length === 0) throw new Error(`${data} has no images: run build.mjs first`);
const kindOf = (icon) => CLASSES[icon.concept.subcategory] ?? null;
const by = (key) => icons.reduce((all, icon) => { (all[key(icon)] ??= []).push(icon); return all; }, {});
const inSplit = by((icon) => splitOf(icon.group));
const inKind = by((icon) => `${splitOf(icon.group)} ${kindOf(icon)}`);
const kinds = [...new Set(icons.map(kindOf).filter(Boolean))].sort();
/** Kinds that answer the same question. */
const siblings = (icon) => kinds.filter((kind) => kind !== kindOf(icon) && Object.entries(CLASSES)
  .some(([sub, name]) => name === kind && questionOf(sub) === questionOf(icon.concept.subcategory)));

/** An icon of another concept and name in the same split. */
function other(icon, list, ...key) {
  const fine = (o) => o.group !== icon.group && o.concept.name !== icon.concept.name;
  for (let i = 0; i < 20; i += 1) {
    const found = pick(list, ...key, i);
    if (fine(found)) return found;
  }
  return list.find(fine);
}

function answers(icon, base, key) {
  const { subcategory, keywords } = icon.concept;
  const kind = kindOf(icon);
  if (!kind) return [];
  const rows = [{ ...base, id: `${base.id}#kind`, question: questionOf(subcategory), answer: kind }];
  const wrong = pick(siblings(icon).length ? siblings(icon) : kinds.filter((k) => k !== kind), "wrong kind", ...key);
  const yes = chance("yes", ...key) < 0.5;
  rows.push({ ...base, id: `${base.id}#is`, question: `is this ${article(yes ? kind : wrong)}?`, answer: yes ? "yes" : "no" });
  if (keywords.length > 0) {
    const word = pick(keywords, "word", ...key);
    const choices = new Set([word]);
    for (let i = 0; choices.size < 4 && i < 100; i += 1) {
      const away = pick(inSplit[base.split], "choice", ...key, i).concept;
      const found = away.keywords.length ? pick(away.keywords, "choice word", ...key, i) : null;
      if (found && !keywords.includes(found)) choices.add(found);
    }
    const order = [...choices].sort((a, b) => chance("order", ...key, a) - chance("order", ...key, b));
    rows.push({ ...base, id: `${base.id}#word`, question: "which word goes with this?", answer: word, choices: order });
  }
  return rows;
}

const tables = { pairs: [], match: [], answer: [] };
for (const icon of icons) {
  const { set, slug, concept: { name, aliases, keywords }, group } = icon;
  const key = [set, slug];
  const kind = kindOf(icon);
  const base = { id: `${set}/${slug}`, image: relative(out, join(data, "img", set, `${slug}.png`)), style: set, group, split: splitOf(group) };
  const words = keywords.slice(0, 6);
  const texts = [...new Set([name, ...aliases, ...(words.length > 1 ? [words.join(", ")] : [])])];
  tables.pairs.push({ ...base, text: texts, label: kind, labels: words });
  const hard = chance("hard", ...key) < 0.5 && inKind[`${base.split} ${kind}`].some((o) => o.group !== group && o.concept.name !== name);
  const away = other(icon, hard ? inKind[`${base.split} ${kind}`] : inSplit[base.split], "other", ...key);
  tables.match.push({ ...base, id: `${base.id}#fits`, text: article(name), fits: true });
  tables.match.push({ ...base, id: `${base.id}#not`, text: article(away.concept.name), fits: false });
  tables.answer.push(...answers(icon, base, key));
}
mkdirSync(out, { recursive: true });
for (const [name, rows] of Object.entries(tables)) {
  writeFileSync(join(out, `${name}.jsonl`), rows.map((row) => JSON.stringify(row) + "\n").join(""));
}
const count = (rows) => rows.reduce((all, { split }) => ({ ...all, [split]: (all[split] ?? 0) + 1 }), {});
console.log(JSON.stringify({ styles: new Set(icons.map((i) => i.set)).size, groups: new Set(icons.map((i) => i.group)).size,
  ...Object.fromEntries(Object.entries(tables).map(([name, rows]) => [name, count(rows)])) }, null, 1));
