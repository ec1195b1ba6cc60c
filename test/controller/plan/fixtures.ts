// Published configurations, as sources.
import { pathToFileURL } from "node:url";

const CONFIGS = new URL("../../fixtures/configs/", import.meta.url);

export function fixtureUrl(name: string): string {
  return pathToFileURL(new URL(name, CONFIGS).pathname).href;
}
