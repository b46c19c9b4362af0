// The browser's storage for this page. Where a browser blocks it, what is kept lasts as long as the page.

/** @param {"localStorage" | "sessionStorage"} name */
function opened(name) {
  try {
    const storage = window[name];
    storage.getItem("");
    return {
      read: (key) => storage.getItem(key),
      write: (key, text) => storage.setItem(key, text),
      remove: (key) => storage.removeItem(key),
      keys: () => Object.keys(storage),
    };
  } catch {
    const kept = new Map();
    return {
      read: (key) => kept.get(key) ?? null,
      write: (key, text) => void kept.set(key, text),
      remove: (key) => void kept.delete(key),
      keys: () => [...kept.keys()],
    };
  }
}

/** What all tabs share, and later visits too. */
export const lasting = opened("localStorage");
/** What this tab keeps over a reload. */
export const ofTab = opened("sessionStorage");
