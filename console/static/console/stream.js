// Reading a server-sent stream and summing up its gaps. Pure functions.

// Whole events of a server-sent stream: [[data, …], rest].
export function split(buffer) {
  const parts = buffer.replaceAll("\r\n", "\n").split("\n\n");
  const rest = parts.pop();
  const data = parts.map((part) => part.split("\n").filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(5).trimStart()).join("\n")).filter((text) => text !== "");
  return [data, rest];
}

export function quantile(values, q) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil(q * sorted.length) - 1)];
}
