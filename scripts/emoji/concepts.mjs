// Concepts: which emoji an icon shows, what it is called, and which group it must not be parted from.
import { createHash } from "node:crypto";
import { existsSync, readFileSync } from "node:fs";

const here = new URL(".", import.meta.url);
const json = (path) => JSON.parse(readFileSync(new URL(path, here)));
const pkg = (path) => json(`node_modules/${path}`);

export const SEED = "peft-emoji-1";
export const TRAIN_SETS = ["noto", "twemoji", "openmoji", "emojione", "noto-v1", "fxemoji", "emojione-v1", "streamline-emojis"];
export const EVAL_SETS = ["fluent-emoji-flat", "fluent-emoji-high-contrast"];
const HELD_OUT_SHARE = 0.1;

/** A number in [0, 1) that depends on the seed and the key only, so adding emoji moves no other. */
export const chance = (...key) => createHash("sha256").update([SEED, ...key].join("\0")).digest().readUInt32BE() / 2 ** 32;

/** Lower-case ASCII words. */
export const words = (text) => text.normalize("NFKD").replace(/[\u0300-\u036f’'.]/g, "").toLowerCase()
  .replace(/&/g, " and ").replace(/[^a-z0-9]+/g, " ").trim();
const squash = (text) => words(text).replace(/ /g, "");
const code = (unified) => unified.toLowerCase().split("-").filter((c) => c !== "fe0f").join("-");
const hasTone = (c) => /1f3f[b-f]/.test(c);

// Emoji whose genders are codepoints of their own; the rest carry a gender sign or a person in a ZWJ sequence.
const GENDERLESS = {
  "1f466": "1f9d2", "1f467": "1f9d2", "1f468": "1f9d1", "1f469": "1f9d1", "1f474": "1f9d3", "1f475": "1f9d3",
  "1f934": "1fac5", "1f478": "1fac5", "1f385": "1f9d1-200d-1f384", "1f936": "1f9d1-200d-1f384", "1f57a": "1f483",
  "1f930": "1fac4", "1fac3": "1fac4", "1f46c": "1f46b", "1f46d": "1f46b", "1f9d1-200d-1f91d-200d-1f9d1": "1f46b",
};

/** The group of a code: the concept without gender and direction. */
export function groupOf(c) {
  let g = c.replace(/-200d-(2640|2642|27a1)/g, "");
  g = GENDERLESS[g] ?? g;
  if (/^(1f46[89]|1f9d1)-200d-2764-200d-1f48b/.test(g)) return "1f48f"; // kiss
  if (/^(1f46[89]|1f9d1)-200d-2764/.test(g)) return "1f491"; // couple with heart
  if (/^(1f46[89]|1f9d1)-200d-(1f46[6789]|1f9d[12])/.test(g)) return "1f46a"; // family
  return g.replace(/^1f46[89](?=-200d)/, "1f9d1");
}

/** code -> { code, name, aliases, keywords, subcategory, category } of every emoji in emoji-datasource. */
function datasource() {
  const keywords = new Map(Object.entries(pkg("emojilib/dist/emoji-en-US.json"))
    .map(([emoji, list]) => [code([...emoji].map((c) => c.codePointAt(0).toString(16)).join("-")), list.map(words)]));
  const table = new Map();
  const taken = new Set();
  for (const e of pkg("emoji-datasource/emoji.json")) {
    if (e.category === "Component") continue;
    const c = code(e.unified);
    const [known = words(e.name ?? e.short_name), ...rest] = keywords.get(c) ?? [];
    const others = [...new Set([words(e.name ?? ""), ...e.short_names.map(words)])].filter((a) => a.length > 2);
    // emojilib calls two persons as it calls their male forms.
    const name = taken.has(known) ? others.find((a) => !taken.has(a)) ?? known : known;
    taken.add(name);
    const aliases = others.filter((a) => a !== name);
    table.set(c, {
      code: c, name, aliases, subcategory: e.subcategory, category: words(e.category),
      keywords: [...new Set(rest)].filter((k) => k.length > 1 && k.split(" ").length < 4 && !name.split(" ").includes(k)),
    });
  }
  return table;
}

function loadSet(name) {
  const dir = `@iconify-json/${name}`;
  const set = pkg(`${dir}/icons.json`);
  const chars = existsSync(new URL(`node_modules/${dir}/chars.json`, here)) ? pkg(`${dir}/chars.json`) : {};
  return { name, set, codes: new Map(Object.entries(chars).map(([c, slug]) => [slug, code(c)]).reverse()) };
}

/** Names -> code, from every set that states codepoints, then from emoji-datasource. */
function nameIndex(sets, table) {
  const index = new Map();
  const add = (name, c) => { if (name && !index.has(squash(name))) index.set(squash(name), c); };
  for (const { set, codes } of sets) {
    for (const [slug, c] of codes) add(slug, c);
    for (const [alias, { parent, hFlip }] of Object.entries(set.aliases ?? {})) if (!hFlip) add(alias, codes.get(parent));
  }
  for (const e of table.values()) [e.name, ...e.aliases].forEach((n) => add(n, e.code));
  return index;
}

// OpenMoji's own pictograms without brands, flags and near-duplicates: concepts of one style, named by their slugs.
function extraOf(set, slug, c) {
  if (set !== "openmoji" || !c || /flag|-low$/.test(slug) || /^(e04|e05|e06|f)/.test(c)) return null;
  return { code: c, name: words(slug), aliases: [], keywords: [], subcategory: null, category: null };
}

/** Every usable icon of every set, with the concept it shows; skin tones are left out. */
export function loadIcons() {
  const table = datasource();
  const sets = [...TRAIN_SETS, ...EVAL_SETS].map(loadSet);
  const index = nameIndex(sets, table);
  const counts = {};
  const icons = [];
  for (const { name, set, codes } of sets) {
    const seen = new Set();
    const count = (counts[name] = { icons: 0, matched: 0, extra: 0, skin_tones: 0, unmatched: 0 });
    for (const [slug, icon] of Object.entries(set.icons)) {
      count.icons += 1;
      const plain = name === "streamline-emojis" ? slug.replace(/-\d$/, "") : slug; // it numbers several drawings of one emoji
      const c = codes.get(slug) ?? index.get(squash(plain)) ?? index.get(squash(plain.replace(/^flag-for-/, "flag-")));
      if (/-(tone\d|(medium-|medium)?(light|dark)?(-skin-tone)?)$/.test(slug) && !table.has(c) || hasTone(c ?? "")) { count.skin_tones += 1; continue; }
      const concept = table.get(c) ?? extraOf(name, slug, c);
      if (!concept || (seen.has(c) && plain === slug)) { count.unmatched += 1; continue; }
      seen.add(c);
      count[table.has(c) ? "matched" : "extra"] += 1;
      const width = icon.width ?? set.width ?? 16, height = icon.height ?? set.height ?? 16;
      const svg = `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="${icon.left ?? 0} ${icon.top ?? 0} ${width} ${height}">${icon.body.replaceAll("currentColor", "#000")}</svg>`;
      icons.push({ set: name, slug, plain, concept, group: groupOf(c), svg, tall: height > width });
    }
  }
  return { icons, counts };
}

/** Groups that no pretraining image shows, whatever its style. */
export const isHeldOut = (group) => chance("held-out", group) < HELD_OUT_SHARE;
export const CLASSES = json("classes.json");
