// What the pages share.

export const $ = (id) => document.getElementById(id);

/** Makes an element; text and children are never parsed. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** A header takes no other characters, nor does a key. */
export const encodedKey = (key) => key.replace(/[^\x20-\x7e]/g, "?");
