// What the store of nodes keeps: everything that is read of a node, and not what its images are.
import { expect, test } from "vitest";
import { fieldsOf } from "../../../../controller/kube/api/fields.ts";
import { nodeFacts } from "../../../../controller/kube/inventory/node-facts.ts";
import { keptNode } from "../../../../controller/kube/watch/kept-node.ts";
import { node } from "../objects.ts";

test("a node is read as before, without images and managedFields", () => {
  const plain = node("n", { gpus: 8 });
  const images = [{ names: ["images.example/app@sha256:0"], sizeBytes: 1 }];
  const metadata = { ...plain.metadata, ...{ managedFields: [{ manager: "kubelet" }] } };
  const full = { ...plain, metadata, status: { ...fieldsOf(plain.status), images } };
  expect(keptNode(full)).toEqual(plain);
  expect(nodeFacts(keptNode(full))).toEqual(nodeFacts(full));
});
