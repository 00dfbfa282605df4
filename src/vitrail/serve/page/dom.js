// Small helpers: elements, text, numbers.

export const $ = id => document.getElementById(id);

export function make(tag, kind = "", text = "") {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.textContent = text;
  return element;
}

// Set only what changed: otherwise a screen reader would read it again.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function percent(share) {
  const text = (100 * share).toFixed(1);
  return text === "0.0" && share > 0 ? "< 0.1%" : `${text}%`;
}

export const whole = share => `${Math.round(100 * share)}%`;

export const short = value => (value && Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(3))));

export function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => {
    const option = make("option", "", text);
    option.value = value;
    return option;
  }));
  select.value = chosen;
  if (select.selectedIndex < 0) select.selectedIndex = 0;
}

export const complain = error => say($("problem"), error ? error.message ?? String(error) : "");
