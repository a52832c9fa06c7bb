// As much of a browser as the page of `ipvrm inspect` uses: runs the script of PAGE at #HASH and prints what it drew.
// node browser.js PAGE HASH
const make = tag => {
  const node = { tag, children: [], attributes: {}, style: {}, className: "", clientWidth: 400, value: "", own: "" };
  const classes = new Set();
  node.classList = { add: name => classes.add(name), remove: name => classes.delete(name) };
  node.append = (...items) => { node.children.push(...items); };
  node.replaceChildren = () => { node.children = []; node.own = ""; };
  node.setAttribute = (name, value) => { node.attributes[name] = String(value); };
  node.getBoundingClientRect = () => ({ left: 0 });
  Object.defineProperty(node, "textContent", { set(value) { node.own = String(value); }, get() { return text(node); } });
  return node;
};
const text = node => typeof node === "string" ? node : node.own + node.children.map(text).join("");
const all = (node, test) =>
  typeof node === "string" ? [] : [...(test(node) ? [node] : []), ...node.children.flatMap(child => all(child, test))];
const page = require("fs").readFileSync(process.argv[2], "utf8"), known = {};
globalThis.document = {
  getElementById: id => known[id] ??= make(id),
  createElement: make,
  createElementNS: (_, tag) => make(tag),
};
globalThis.window = {};
globalThis.location = { hash: process.argv[3] };
globalThis.history = { replaceState(_, __, hash) { location.hash = hash; } };
const [, data] = page.match(/<script type="application\/json" id="data">([^]*?)<\/script>/);
document.getElementById("data").textContent = data;
(0, eval)(page.match(/<script>\n([^]*?)<\/script>\n<\/body>/)[1]);

const of = (id, test) => all(known[id], test), named = name => node => node.className === name;
const ticks = id => of(id, node => node.attributes.class === "tick").map(text);
const heads = () => [0, 1].map(v => known[`panel-${v}`] && text(known[`panel-${v}`].children[0]));
const found = {
  heads: heads(),
  numbers: of("answer-0", named("no")).map(text),
  steps: known["steps-0"].children.slice(1).map(row => text(row.children[0])),
  flags: of("answer-0", named("flag")).map(text),
  ticks: [ticks("value-0"), ticks("mean-0")],
  colours: {},
};
for (const option of known.quantity.children) {
  known.quantity.value = option.value;
  known.quantity.onchange();
  const drawn = [0, 1].filter(v => known[`answer-${v}`]).map(v => of(`answer-${v}`, named("token")));
  found.colours[option.value] = [text(option), ...drawn.map(row => row.map(node => node.style.background))];
}
of("answer-0", named("token"))[3].onclick();
console.log(JSON.stringify({ ...found, clicked: heads(), hash: location.hash }));
