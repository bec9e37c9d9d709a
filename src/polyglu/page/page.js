'use strict';

/* Details of what is pointed at: one box for the whole page. */
const tip = document.getElementById('tip');

let anchor = null;

function showTip(content, pointed) {
  anchor = pointed;
  tip.replaceChildren(...content);
  tip.hidden = false;
  placeTip();
}

function placeTip() {
  if (tip.hidden) return;
  const { width, height } = tip.getBoundingClientRect();
  const box = anchor.getBoundingClientRect();
  const edge = 8, gap = 14;
  const left = Math.min(Math.max(edge, box.left + box.width / 2 - width / 2), document.documentElement.clientWidth - width - edge);
  const above = box.top - height - gap;
  const top = above >= edge ? above : Math.min(box.bottom + gap, innerHeight - height - edge);
  tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
}

addEventListener('scroll', placeTip, { capture: true, passive: true });

function element(name, className, text = '') {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

/* What explores by pointer or keys: show(place) shows details, clear() ends it, step(key) gives the next place or null. */
function explorable(area, label, at, step, show, clear) {
  area.tabIndex = 0;
  area.setAttribute('role', 'application');
  area.setAttribute('aria-label', label);
  const end = () => { tip.hidden = true; clear(); };
  const point = (event) => {
    const place = at(event);
    if (place === null) end(); else show(place);
  };
  area.addEventListener('pointermove', point);
  area.addEventListener('pointerdown', point);
  area.addEventListener('pointerleave', (event) => { if (event.pointerType === 'mouse') end(); });
  area.addEventListener('blur', end);
  area.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === 'Escape') { end(); return; }
    const place = step(event.key);
    if (place === null) return;
    event.preventDefault();
    show(place, true);
  });
}

/* Tables: a click on a heading sorts by it, up, down, and as it was; equal rows keep their order, empty cells come last. */
const collator = new Intl.Collator('en', { numeric: true });

function keyOf(cell) {
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  return cell.classList.contains('number') || cell.textContent === '–' ? null : cell.textContent;
}

function compare(a, b) {
  if (typeof a !== typeof b) return typeof a === 'number' ? -1 : 1;
  return typeof a === 'number' ? a - b : collator.compare(a, b);
}

function sortRows(table, rows, column, direction) {
  const keys = new Map(rows.map((row) => [row, keyOf(row.cells[column])]));
  const sorted = direction === 0 ? rows : [...rows].sort((first, second) => {
    const [a, b] = [keys.get(first), keys.get(second)];
    if (a === null || b === null) return (a === null) - (b === null);
    return direction * compare(a, b);
  });
  table.tBodies[0].append(...sorted);
}

for (const table of document.querySelectorAll('table')) {
  const rows = [...table.tBodies[0].rows];
  const headings = [...table.tHead.rows[0].cells];
  if (rows.length < 2) continue;
  headings.forEach((heading, column) => {
    const button = element('button', 'sort');
    button.type = 'button';
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener('click', () => {
      const states = { ascending: 'descending', descending: null };
      const before = heading.getAttribute('aria-sort');
      const next = before === null ? 'ascending' : states[before];
      for (const other of headings) other.removeAttribute('aria-sort');
      if (next) heading.setAttribute('aria-sort', next);
      sortRows(table, rows, column, next === null ? 0 : next === 'ascending' ? 1 : -1);
    });
  });
}

/* What is wider than the page scrolls by itself, and can then be reached by keyboard. */
const sizes = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0; else target.removeAttribute('tabindex');
  }
});
for (const area of document.querySelectorAll('.scroll')) sizes.observe(area);

/* Figures: the nearest mark tells its text. */
for (const plot of document.querySelectorAll('.plot')) {
  const data = plot.querySelector('script');
  if (data === null) continue;
  const marks = JSON.parse(data.textContent);
  const image = plot.querySelector('img');
  const dot = element('div', 'dot');
  dot.hidden = true;
  plot.append(dot);
  const reach = 40;
  let current = -1;

  const at = (event) => {
    const box = image.getBoundingClientRect();
    let best = null, least = reach;
    marks.forEach(([x, y], index) => {
      const distance = Math.hypot(box.left + x * box.width - event.clientX, box.top + y * box.height - event.clientY);
      if (distance < least) [best, least] = [index, distance];
    });
    return best;
  };
  const step = (key) => {
    const moves = { ArrowRight: current + 1, ArrowDown: current + 1, ArrowLeft: current - 1, ArrowUp: current - 1 };
    const ends = { Home: 0, End: marks.length - 1 };
    const place = moves[key] ?? ends[key] ?? null;
    return place === null ? null : Math.min(Math.max(0, place), marks.length - 1);
  };
  const show = (index, byKey = false) => {
    current = index;
    const [x, y, text] = marks[index];
    dot.hidden = false;
    dot.style.left = `${image.offsetLeft + x * image.offsetWidth}px`;
    dot.style.top = `${image.offsetTop + y * image.offsetHeight}px`;
    if (byKey) dot.scrollIntoView({ block: 'nearest', inline: 'nearest' });
    showTip([text], dot);
  };
  explorable(plot, `${image.alt} Arrow keys step through its points.`, at, step, show, () => { dot.hidden = true; });
}

/* Routing along a text: a column of fields below each token, one a layer. */
for (const figure of document.querySelectorAll('.routing')) {
  const { names, colours, layers, dominant, shares } = JSON.parse(figure.querySelector('script').textContent);
  const area = figure.querySelector('.tokens');
  const tokens = [...area.querySelectorAll('span')];
  const cell = layers <= 8 ? 11 : layers <= 16 ? 8 : 5;
  const palest = 0.3;
  const field = element('div', 'field');
  field.hidden = true;
  area.append(field);
  area.style.setProperty('--column', `${layers * cell}px`);

  const sharesAt = (token, layer) => {
    const start = (token * layers + layer) * names.length;
    return shares.slice(start, start + names.length).map((share) => share / 1000);
  };
  const colourAt = (token, layer) => {
    const index = dominant[token * layers + layer];
    if (index === names.length) return 'var(--none)';
    const strength = names.length === 1 ? 1 : (sharesAt(token, layer)[index] * names.length - 1) / (names.length - 1);
    const depth = palest + (1 - palest) * Math.max(0, strength);
    return colours[index] + Math.round(255 * depth).toString(16).padStart(2, '0');
  };
  tokens.forEach((token, index) => {
    const stops = Array.from({ length: layers }, (_, layer) => `${colourAt(index, layer)} ${layer * cell}px ${(layer + 1) * cell - 1}px,`
      + ` transparent ${(layer + 1) * cell - 1}px ${(layer + 1) * cell}px`);
    token.style.backgroundImage = `linear-gradient(${stops.join(', ')})`;
  });

  const numberOf = new Map(tokens.map((token, index) => [token, index]));
  let current = [0, 0], marked = null;
  const at = (event) => {
    const token = event.target.closest('.tokens span');
    if (token === null) return null;
    const fromTop = event.clientY - (token.getBoundingClientRect().bottom - layers * cell);
    return [numberOf.get(token), Math.min(Math.max(0, Math.floor(fromTop / cell)), layers - 1)];
  };
  const step = (key) => {
    const [token, layer] = current;
    const last = tokens.length - 1;
    const moves = {
      ArrowRight: [Math.min(token + 1, last), layer], ArrowLeft: [Math.max(token - 1, 0), layer],
      ArrowDown: [token, Math.min(layer + 1, layers - 1)], ArrowUp: [token, Math.max(layer - 1, 0)],
      Home: [0, layer], End: [last, layer],
    };
    return marked === null && key.startsWith('Arrow') ? current : moves[key] ?? null;
  };
  const clear = () => {
    field.hidden = true;
    marked?.classList.remove('here');
    marked = null;
  };
  const show = ([token, layer], byKey = false) => {
    clear();
    current = [token, layer];
    marked = tokens[token];
    marked.classList.add('here');
    if (byKey) marked.scrollIntoView({ block: 'nearest' });
    const top = marked.offsetTop + marked.offsetHeight - (layers - layer) * cell;
    Object.assign(field.style, {
      left: `${marked.offsetLeft - 2}px`, top: `${top - 2}px`, width: `${marked.offsetWidth + 4}px`, height: `${cell + 3}px`,
    });
    field.hidden = false;
    const rows = sharesAt(token, layer).map((share, index) => {
      const row = element('div', 'share'), swatch = element('i', ''), room = element('span', ''), bar = element('i', '');
      swatch.style.background = bar.style.background = colours[index];
      bar.style.width = `${100 * share}%`;
      room.append(bar);
      row.append(swatch, element('span', '', names[index]), room, element('b', '', `${(100 * share).toFixed(1)}%`));
      return row;
    });
    const name = element('strong', '', `“${marked.textContent}”`);
    showTip([name, `token ${token + 1} of ${tokens.length}, layer ${layer}`, ...rows], field);
  };
  explorable(area, area.getAttribute('aria-label'), at, step, show, clear);
}
