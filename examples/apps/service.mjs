// JavaScript through a Qdrant server whose inference address is `dclip-qdrant serve` (examples/deploy/compose.yaml wires the two).
//   npm install @qdrant/js-client-rest
//   node service.mjs http://localhost:6333 MODEL PICTURES...
import { readFileSync } from "node:fs";
import { QdrantClient } from "@qdrant/js-client-rest";

const [url, model, ...pictures] = process.argv.slice(2);
const size = Number(process.env.DCLIP_DIM ?? 512);
const client = new QdrantClient({ url, checkCompatibility: false });
const image = (path) => ({ image: readFileSync(path).toString("base64"), model }); // never a path: the service can't and won't open it

await client.createCollection("pictures", { vectors: { image: { size, distance: "Cosine" } } });
await client.upsert("pictures", {
  wait: true,
  points: pictures.map((path, id) => ({ id, vector: { image: image(path) }, payload: { path } })),
});
for (const query of [{ text: "a red square", model }, image(pictures[0])]) {
  const found = await client.query("pictures", { query, using: "image", limit: 1, with_payload: true });
  console.log(found.points[0].score.toFixed(4), found.points[0].payload.path);
}
