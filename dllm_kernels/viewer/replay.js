"use strict";
// What a recording holds is written by replay.py: texts, and for each run its tokens as numbers of texts.
const { texts, runs } = JSON.parse(document.getElementById("recording").textContent);
const MASK = -1;
const SCALES = {
  // From the first step to the last, and from certain to unsure: lightness alone tells the order.
  step: {
    light: ["#f3f6d9", "#bfe3c6", "#6fc1c4", "#2f8fbd", "#2459a0", "#232a6b"],
    dark: ["#1d2a4f", "#22528c", "#2482ab", "#4fb3b4", "#a4dcae", "#f2f5c4"],
  },
  probability: {
    light: ["#fdf8ee", "#fde0b6", "#f9b670", "#e8813a", "#b95016", "#7a2c06"],
    dark: ["#22252b", "#55341a", "#8f4a14", "#cc6f20", "#f2a352", "#ffe0b0"],
  },
};
const dark = matchMedia("(prefers-color-scheme: dark)");
const by = (id) => document.getElementById(id);
const steps = Math.max(...runs.map((run) => run.writes.length));
let step = steps;
let colour = "step";
let playing = null;
let pinned = null;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// ---- colours ----------------------------------------------------------------------------------------------

function blend(scale, place) {
  const anchors = SCALES[scale][dark.matches ? "dark" : "light"];
  const at = Math.min(Math.max(place, 0), 1) * (anchors.length - 1);
  const low = Math.min(Math.floor(at), anchors.length - 2);
  const channels = (colour) => [1, 3, 5].map((from) => parseInt(colour.slice(from, from + 2), 16));
  const [first, second] = [channels(anchors[low]), channels(anchors[low + 1])];
  return first.map((value, channel) => Math.round(value + (second[channel] - value) * (at - low)));
}

function ink(channels) {
  const linear = channels.map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 ? "#000000" : "#ffffff";
}

function paintScale() {
  by("scale").classList.toggle("none", colour === "plain");
  if (colour === "plain") return;
  const stops = [0, 0.2, 0.4, 0.6, 0.8, 1].map((place) => `rgb(${blend(colour, place)})`);
  by("scale-bar").style.background = `linear-gradient(to right, ${stops})`;
  by("scale-low").textContent = colour === "step" ? "step 1" : "100%";
  by("scale-high").textContent = colour === "step" ? `${steps}` : "0%";
}

// ---- tokens -----------------------------------------------------------------------------------------------

class Token {
  constructor(run, position) {
    this.run = run;
    this.position = position;
    // The states that the position goes through: [step, text], the first of them at step 0.
    this.states = [[0, run.initial[position]]];
    this.node = element("span", "token");
    this.node.token = this;
    this.drawn = null;
  }

  get given() {
    return this.states.length === 1;
  }

  at(step) {
    let last = 0;
    while (last + 1 < this.states.length && this.states[last + 1][0] <= step) last += 1;
    return last;
  }

  paint() {
    const last = this.at(step);
    const [since, text] = this.states[last];
    const masked = text === MASK;
    // A mask takes the room of the token that will stand there, so that lines do not move.
    this.draw(masked && last + 1 < this.states.length ? this.states[last + 1][1] : text);
    const written = last > 0 && !masked;
    const list = this.node.classList;
    list.toggle("given", this.given && !masked);
    list.toggle("masked", masked);
    list.toggle("fresh", written && since === step && step < steps);
    list.toggle("rewritten", written && this.states[last - 1][1] !== MASK);
    const place = written ? this.place(last) : null;
    const channels = place === null ? null : blend(colour, place);
    this.node.style.backgroundColor = channels ? `rgb(${channels})` : "";
    this.node.style.color = channels ? ink(channels) : "";
    if (!this.given) this.node.setAttribute("aria-label", masked ? "masked" : spoken(texts[text]));
  }

  place(state) {
    if (colour === "step") return steps > 1 ? (this.states[state][0] - 1) / (steps - 1) : 0;
    const probability = state === this.states.length - 1 ? this.run.probabilities?.[this.position] : null;
    return colour === "probability" && probability != null ? 1 - probability : null;
  }

  draw(text) {
    if (text === this.drawn) return;
    this.drawn = text;
    this.node.replaceChildren();
    const string = text === MASK ? " " : texts[text];
    this.node.classList.toggle("void", string === "");
    string.split("\n").forEach((line, index) => {
      if (index > 0) this.node.append(element("span", "end"), "\n");
      this.node.append(line);
    });
  }
}

function spoken(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "·";
}

function percent(probability) {
  if (probability == null) return "–";
  if (probability < 0.0005) return "<0.1%";
  return `${(100 * probability).toFixed(probability >= 0.9995 ? 0 : 1)}%`;
}

for (const run of runs) {
  run.tokens = run.initial.map((_, position) => new Token(run, position));
  run.writes.forEach((written, index) => {
    for (const [position, text] of written) run.tokens[position].states.push([index + 1, text]);
  });
  const article = element("article");
  const heading = element("h2", "", run.name);
  heading.dir = "auto";
  run.figures = element("p", "figures");
  run.text = element("div", "text");
  run.text.dir = "auto";
  run.text.setAttribute("role", "group");
  run.text.setAttribute("aria-label", `${run.name}: text`);
  run.text.append(...run.tokens.map((token) => token.node));
  run.written = run.tokens.filter((token) => !token.given);
  for (const token of run.written) {
    token.node.setAttribute("role", "button");
    token.node.tabIndex = -1;
  }
  if (run.written.length) run.written[0].node.tabIndex = 0;
  article.append(heading, run.figures, run.text);
  by("runs").append(article);
}

// ---- the timeline: for each run a bar for each step, as high as the tokens it wrote are many ----------------

const highest = Math.max(1, ...runs.flatMap((run) => run.writes.map((written) => written.length)));
for (const run of runs) {
  const bars = element("div", "bars");
  bars.title = `${run.name}: tokens written in each step`;
  const path = run.writes
    .map(({ length }) => (length ? Math.max(length, highest / 10) : 0))
    .map((height, index) => `M${index + 0.12} ${highest}v${-height}h0.76v${height}z`)
    .join("");
  run.past = ["", "past"].map((className) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", `0 0 ${Math.max(steps, 1)} ${highest}`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    if (className) svg.classList.add(className);
    const shape = document.createElementNS(svg.namespaceURI, "path");
    shape.setAttribute("d", path);
    svg.append(shape);
    bars.append(svg);
    return svg;
  })[1];
  by("timeline").append(bars);
}

// ---- the token that is pointed at --------------------------------------------------------------------------

function about(token) {
  const told = element("div");
  told.append(...(token ? facts(token) : [element("p", "", "Point at a token, tap it, or reach it with Tab.")]));
  // A screen reader speaks what changes here, so what stays is not touched.
  if (told.innerHTML !== by("token").innerHTML) by("token").replaceChildren(...told.childNodes);
}

function facts(token) {
  const { run, position, states } = token;
  const last = token.at(step);
  const [since, text] = states[last];
  const head = element("div", "about");
  head.append(element("b", "", text === MASK ? "masked" : spoken(texts[text])));
  const lines = [];
  if (text === MASK) lines.push(last + 1 < states.length ? `written in step ${states[last + 1][0]}` : "never written");
  else if (last === 0) lines.push("given");
  else lines.push(`step ${since}`);
  const final = last === states.length - 1 && last > 0 && text !== MASK;
  if (final && run.probabilities) lines.push(percent(run.probabilities[position]));
  lines.push(`position ${position}`);
  head.append(element("p", "", lines.join(" · ")));
  const before = states.slice(1, last).filter(([, text]) => text !== MASK);
  if (last > 1 || (last === 1 && states[0][1] !== MASK)) {
    const earlier = (states[0][1] === MASK ? before : [states[0], ...before]).map(
      ([since, text]) => `${spoken(texts[text])} (${since ? `step ${since}` : "given"})`,
    );
    if (earlier.length) head.append(element("p", "", ` replaced ${earlier.join(", ")}`));
  }
  if (!final || !run.alternatives) return [head];
  const list = element("ul", "alternatives");
  list.setAttribute("aria-label", "Likeliest tokens at that step");
  for (const [other, probability] of run.alternatives[position]) {
    const item = element("li", other === text ? "taken" : "");
    const bar = element("i");
    bar.style.width = `${100 * (probability ?? 0)}%`;
    item.append(element("code", "", spoken(texts[other])), bar, element("span", "", percent(probability)));
    list.append(item);
  }
  return [head, list];
}

function choose(token) {
  pinned?.node.classList.remove("chosen");
  pinned = token;
  pinned?.node.classList.add("chosen");
  about(pinned);
}

const tokenOf = (event) => event.target.closest?.(".token")?.token ?? null;
by("runs").addEventListener("pointerover", (event) => {
  if (event.pointerType === "mouse") about(tokenOf(event) ?? pinned);
});
by("runs").addEventListener("pointerleave", () => about(pinned));
by("runs").addEventListener("click", (event) => choose(tokenOf(event)));
by("runs").addEventListener("focusin", (event) => {
  const token = tokenOf(event);
  if (!token) return;
  for (const other of token.run.written) other.node.tabIndex = other === token ? 0 : -1;
  choose(token);
});

// ---- time --------------------------------------------------------------------------------------------------

function paint() {
  for (const run of runs) {
    for (const token of run.tokens) token.paint();
    const done = Math.min(step, run.writes.length);
    const standing = run.written.filter((token) => token.states[token.at(step)][1] !== MASK).length;
    const each = done ? ` · ${(standing / done).toFixed(2)} per forward` : "";
    run.figures.textContent = `${standing} of ${run.written.length} tokens · ${done} of ${run.writes.length} forwards${each}`;
    run.past.style.clipPath = `inset(0 ${100 - (100 * step) / Math.max(steps, 1)}% 0 0)`;
  }
  by("step").value = step;
  by("step").setAttribute("aria-valuetext", `step ${step} of ${steps}`);
  by("where").textContent = `step ${step} / ${steps}`;
  paintScale();
  about(pinned);
}

function go(to) {
  step = Math.min(Math.max(to, 0), steps);
  paint();
}

function play(start) {
  clearInterval(playing);
  playing = null;
  if (start) {
    if (step >= steps) go(0);
    playing = setInterval(() => {
      go(step + 1);
      if (step >= steps) play(false);
    }, 1000 / Number(by("speed").value));
  }
  document.body.classList.toggle("playing", start);
  by("play").setAttribute("aria-label", start ? "Pause" : "Play");
}

function jump(to) {
  play(false);
  go(to);
}

const speeds = [1, 2, 4, 8, 16, 32];
const fitting = speeds.find((speed) => steps / speed <= 10) ?? speeds.at(-1);
for (const speed of speeds) by("speed").append(new Option(`${speed}/s`, speed));
by("speed").value = fitting;
by("speed").addEventListener("change", () => playing !== null && play(true));
by("step").max = steps;
by("step").addEventListener("input", (event) => jump(Number(event.target.value)));
by("first").addEventListener("click", () => jump(0));
by("back").addEventListener("click", () => jump(step - 1));
by("on").addEventListener("click", () => jump(step + 1));
by("last").addEventListener("click", () => jump(steps));
by("play").addEventListener("click", () => play(playing === null));

for (const input of document.querySelectorAll("#colours input")) {
  if (input.value === "probability" && !runs.some((run) => run.probabilities)) {
    input.disabled = true;
    input.parentElement.title = "Recorded without logprobs";
  }
  input.addEventListener("change", () => {
    colour = input.value;
    paint();
  });
}
dark.addEventListener("change", paint);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const { target, key } = event;
  const token = tokenOf(event);
  if (key === "Escape") {
    choose(null);
    target.blur();
  } else if (key === " " && !target.closest("button, select")) {
    play(playing === null);
  } else if (token && (key === "ArrowLeft" || key === "ArrowRight")) {
    const next = token.run.written.indexOf(token) + (key === "ArrowLeft" ? -1 : 1);
    token.run.written[next]?.node.focus();
  } else if (target.closest("input, select")) {
    return;
  } else if (key === "ArrowLeft") jump(step - 1);
  else if (key === "ArrowRight") jump(step + 1);
  else if (key === "Home") jump(0);
  else if (key === "End") jump(steps);
  else return;
  event.preventDefault();
});

paint();
