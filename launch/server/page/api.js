// Requests to the server that has sent the page.

// An absolute address: the page's own may hold the key (http://x:KEY@host), and fetch refuses addresses relative to it.
export const request = (path, options) => fetch(location.origin + path, options);

export const element = (id) => document.getElementById(id);

// Returns a new element with these properties and children (elements or texts).
export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export async function errorMessage(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `the server answered ${response.status}`;
}

export async function getJson(path) {
  const response = await request(path);
  if (!response.ok) throw new Error(await errorMessage(response));
  return response.json();
}

// Yields the data of server-sent events until [DONE].
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server cut the answer off");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}
