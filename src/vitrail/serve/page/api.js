// Requests to the server.

export async function ask(path, {params = {}, body = null, as = "json", signal} = {}) {
  const given = Object.entries(params).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const address = `/api/${path}?${new URLSearchParams(given)}`;
  for (let attempt = 0; ; attempt++) {
    const response = await fetch(address, body ? {method: "POST", body, signal} : {signal});
    if (response.ok) return as === "json" ? response.json() : response.blob();
    if (response.status !== 503 || attempt === 3) {
      const {error} = await response.json().catch(() => ({error: `status ${response.status}`}));
      throw Object.assign(new Error(error), {status: response.status});
    }
    await pause(1000);
  }
}

export const pause = milliseconds => new Promise(resolve => setTimeout(resolve, milliseconds));

// Run one task at a time; of the calls made meanwhile, run only the last.
export function latest(task) {
  let running = false, next = null;
  return async function run(...values) {
    if (running) {
      next = values;
      return;
    }
    running = true;
    try {
      await task(...values);
    } finally {
      running = false;
      if (next) {
        const values = next;
        next = null;
        run(...values);
      }
    }
  };
}

export const encoded = name => encodeURIComponent(name);

export function blobOf(dataUrl) {
  const bytes = Uint8Array.from(atob(dataUrl.split(",")[1]), character => character.charCodeAt(0));
  return new Blob([bytes], {type: "image/png"});
}
