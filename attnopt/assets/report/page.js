"use strict";
(() => {
  const root = document.documentElement, byId = (id) => document.getElementById(id);
  root.classList.add("js");

  // Colours: as the system has them, or as asked for.
  const themes = { auto: "◐", light: "○", dark: "●" }, theme = byId("theme");
  theme.addEventListener("click", () => {
    const names = Object.keys(themes), next = names[(names.indexOf(root.dataset.theme || "auto") + 1) % names.length];
    if (next === "auto") delete root.dataset.theme; else root.dataset.theme = next;
    theme.textContent = `${themes[next]} ${next}`;
    theme.setAttribute("aria-label", `colours: ${next === "auto" ? "as the system" : next}`);
  });

  // On paper everything is open.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const part of closed) part.open = true;
  });
  addEventListener("afterprint", () => { for (const part of closed) part.open = false; });

  const heads = byId("heads");
  if (!heads) return;
  const held = byId("head-data"), data = held ? JSON.parse(held.textContent) : {};
  const rows = [...heads.querySelector(".map tbody").rows].map((row) => [...row.cells].slice(1));
  const cells = rows.flat(), form = heads.querySelector("form"), panel = byId("head");
  const place = (cell) => [cell.parentNode.sectionRowIndex, cell.cellIndex - 1];
  const at = (table, [layer, head]) => table?.[layer]?.[head] ?? null;

  // Text is only ever set as text.
  const make = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    if (text !== null) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const draw = (name, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  // To four digits, as all figures of the page.
  const figures = (value) => {
    const digits = Number(value.toPrecision(4)), [sign, power] = digits.toExponential().split("e");
    return digits && Math.abs(digits) < 1e-4 ? `${sign}e-${power.slice(1).padStart(2, "0")}` : String(digits);
  };

  // A tooltip that shows at once, also for who comes by keyboard.
  const facts = new Map(cells.map((cell) => [cell, cell.title]));
  const tip = make("div", "", { id: "tip", role: "tooltip", hidden: "" });
  heads.querySelector(".split").append(tip);
  for (const cell of cells) {
    cell.setAttribute("aria-label", cell.title.replaceAll("\n", "; "));
    cell.removeAttribute("title");
  }
  const show = (cell) => {
    tip.textContent = facts.get(cell);
    tip.hidden = false;
    const box = tip.parentNode.getBoundingClientRect(), of = cell.getBoundingClientRect();
    const left = Math.min(of.left + 18, root.clientWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(left, 8) - box.left}px`;
    tip.style.top = `${of.bottom - box.top + 8}px`;
  };
  const hide = () => { tip.hidden = true; };

  // The curves of one head.
  const width = 320, height = 190, edge = { left: 46, right: 8, top: 10, bottom: 34 };
  const frame = (name) => {
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name });
    const bottom = height - edge.bottom;
    svg.append(draw("path", { class: "axis", fill: "none", d: `M${edge.left} ${edge.top}V${bottom}H${width - edge.right}` }));
    return svg;
  };
  const label = (svg, x, y, text, anchor = "middle") => svg.append(draw("text", { x, y, "text-anchor": anchor }, text));
  const framed = (svg, caption) => {
    const figure = make("figure", null);
    figure.append(svg, make("figcaption", caption));
    return figure;
  };

  const distances = (mass) => {
    const svg = frame("share of the mass by distance"), bottom = height - edge.bottom, top = Math.max(...mass);
    const step = (width - edge.left - edge.right) / mass.length, every = Math.ceil(mass.length / 7);
    mass.forEach((share, n) => {
      const tall = top > 0 ? (share / top) * (bottom - edge.top) : 0, [low, high] = data.distances[n];
      const bar = draw("rect", { class: "bar", x: edge.left + n * step + 1, width: Math.max(step - 2, 1), y: bottom - tall, height: tall });
      bar.append(draw("title", {}, `${low} to ${high} tokens: ${figures(100 * share)} %`));
      svg.append(bar);
      if (n % every === 0) label(svg, edge.left + (n + 0.5) * step, bottom + 13, String(low));
    });
    label(svg, edge.left - 5, edge.top + 8, `${Math.round(100 * top)} %`, "end");
    label(svg, (width + edge.left) / 2, height - 6, "distance from query to key, tokens");
    return framed(svg, "Where its mass lies");
  };

  // Logarithmic, from the least to the largest positive value; zero lies on the axis.
  const scale = (values, from, to) => {
    const positive = values.filter((value) => value > 0), low = Math.min(...positive), high = Math.max(...positive);
    const span = Math.log(high / low) || 1;
    const map = (value) => (value > 0 ? from + (to - from) * (0.06 + (0.9 * Math.log(value / low)) / span) : from);
    return { map, low, high, any: positive.length > 0 };
  };
  const ticks = (svg, x, y) => {
    const bottom = height - edge.bottom;
    for (const value of new Set([x.low, Math.sqrt(x.low * x.high), x.high])) {
      label(svg, x.map(value), bottom + 13, String(Number(value.toPrecision(2))));
    }
    for (const value of new Set([y.low, y.high])) label(svg, edge.left - 5, y.map(value) + 3, value.toExponential(0), "end");
  };
  const candidates = (points) => {
    const cost = points.some((p) => p.cost !== null), axis = cost ? "cost, share of dense pairs" : "window, tokens";
    const svg = frame(`damage over ${axis}`), spot = (p) => (cost ? p.cost : p.window);
    const drawn = points.filter((p) => p.damage !== null && spot(p) !== null);
    const x = scale(drawn.map(spot), edge.left, width - edge.right), y = scale(drawn.map((p) => p.damage), height - edge.bottom, edge.top);
    if (x.any && y.any) ticks(svg, x, y);
    const front = [];
    for (const p of [...drawn].sort((a, b) => spot(a) - spot(b) || a.damage - b.damage)) {
      if (!front.length || p.damage < front.at(-1).damage) front.push(p);
    }
    const line = front.map((p) => `${x.map(spot(p)).toFixed(1)} ${y.map(p.damage).toFixed(1)}`);
    if (line.length) svg.append(draw("path", { class: "line", d: `M${line.join("L")}` }));
    for (const p of drawn) {
      const dot = draw("circle", { class: p.far ? "far" : "dot", cx: x.map(spot(p)), cy: y.map(p.damage), r: p.far ? 3 : 2.2 });
      dot.append(draw("title", {}, `${p.choice}: ${figures(p.damage)} ${data.unit}`));
      svg.append(dot);
      if (p.chosen) svg.append(draw("circle", { class: "ring", cx: x.map(spot(p)), cy: y.map(p.damage), r: 6 }));
    }
    label(svg, (width + edge.left) / 2, height - 6, axis);
    return framed(svg, `Candidates: damage in ${data.unit}${points.some((p) => p.chosen) ? ", the choice ringed" : ""}`);
  };

  const listed = (points) => {
    const box = make("div", null, { class: "scroll tall", tabindex: "0" }), table = make("table", null), body = make("tbody", null);
    const headings = make("tr", null), cost = points.some((p) => p.cost !== null);
    for (const text of [...(cost ? ["share of pairs"] : []), data.unit]) headings.append(make("th", text, { class: "n" }));
    headings.append(make("th", "candidate"));
    for (const p of points) {
      const row = make("tr", null, p.chosen ? { "aria-current": "true" } : {});
      if (cost) row.append(make("td", p.cost === null ? "" : `${figures(100 * p.cost)} %`, { class: "n" }));
      row.append(make("td", p.damage === null ? "not offered" : figures(p.damage), { class: "n" }));
      row.append(make("td", p.chosen ? `✓ ${p.choice}, chosen` : p.choice));
      body.append(row);
    }
    const head = make("thead", null);
    head.append(headings);
    table.append(head, body);
    box.append(table);
    return box;
  };

  const pin = (cell) => {
    for (const other of heads.querySelectorAll("[aria-selected=true]")) other.removeAttribute("aria-selected");
    cell.setAttribute("aria-selected", "true");
    const [name, ...lines] = facts.get(cell).split("\n"), spot = place(cell), list = make("ul", null);
    lines.forEach((line) => list.append(make("li", line)));
    const curves = make("div", null, { class: "curves" }), parts = [list, curves];
    const mass = at(data.mass, spot), damage = at(data.damage, spot), chosen = at(data.chosen, spot);
    if (mass) curves.append(distances(mass));
    if (damage) {
      const points = data.choices.map((of, n) => ({ ...of, damage: damage[n], chosen: n === chosen }));
      points.sort((a, b) => (a.cost ?? a.window ?? Infinity) - (b.cost ?? b.window ?? Infinity));
      curves.append(candidates(points));
      parts.push(listed(points));
    }
    panel.firstElementChild.textContent = name;
    panel.lastElementChild.replaceChildren(...parts);
    const row = panel.querySelector("[aria-current]"), box = panel.querySelector(".tall");
    if (row) box.scrollTop = row.offsetTop - box.clientHeight / 2;
  };

  // One cell is in the order of tabs; arrows move it.
  let current = cells[0];
  const reach = (cell) => {
    current.tabIndex = -1;
    current = cell;
    cell.tabIndex = 0;
  };
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity] };
  const within = (value, count) => Math.max(0, Math.min(value, count - 1));
  const body = heads.querySelector(".map tbody"), cellOf = (event) => facts.has(event.target) && event.target;
  body.addEventListener("keydown", (event) => {
    const [layer, head] = place(current), move = step[event.key];
    if (move) {
      const row = rows[within(layer + move[0], rows.length)];
      row[within(head + move[1], row.length)].focus();
    } else if (event.key === "Enter" || event.key === " ") pin(current);
    else if (event.key === "Escape") hide();
    else return;
    event.preventDefault();
  });
  body.addEventListener("focusin", (event) => { const cell = cellOf(event); if (cell) { reach(cell); show(cell); } });
  body.addEventListener("focusout", hide);
  body.addEventListener("mouseover", (event) => { const cell = cellOf(event); if (cell) show(cell); else hide(); });
  body.addEventListener("mouseleave", hide);
  body.addEventListener("click", (event) => { const cell = cellOf(event); if (cell) { reach(cell); pin(cell); } });

  // What is not asked for fades.
  const filter = () => {
    const measure = data.measures?.[form.elements.by.value], layer = byId("of-layer").value, kind = byId("of-candidate")?.value ?? "";
    const bound = byId("threshold").value, side = Number(byId("side").value);
    byId("unit").textContent = measure ? measure.unit : "";
    let count = 0;
    for (const cell of cells) {
      const spot = place(cell), value = at(measure?.values, spot);
      const shown = (layer === "" || spot[0] === Number(layer)) && (kind === "" || at(data.kinds, spot) === Number(kind))
        && (bound === "" || (value !== null && side * value >= side * Number(bound)));
      cell.classList.toggle("off", !shown);
      count += shown;
    }
    byId("count").textContent = `${count} of ${cells.length} heads`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();

  // The head that loses most is as good a start as any.
  const losses = ["removal", "harm", "kept"].map((key) => data.measures?.[key]).find((measure) => measure);
  const loss = (cell) => at(losses?.values, place(cell)) ?? -1;
  pin(cells.reduce((best, cell) => (loss(cell) > loss(best) ? cell : best), cells[0]));
})();
