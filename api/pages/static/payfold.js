// Makes pages live: times in the browser's zone, parts of a page that refresh, and the keys "/" and Escape.
// Without this script everything works, in UTC and not live.
"use strict";

const REFRESH_SECONDS = 3;
const REFRESH_SECONDS_MAX = 60;

const stamp = new Intl.DateTimeFormat(undefined, {
  year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit",
});

function localize(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const at = new Date(time.dateTime);
    if (!Number.isNaN(at.getTime())) time.textContent = stamp.format(at);
  }
}

// What a person is using stays as it is: a field, or buttons under the pointer, which would move away from it.
function isInUse(part) {
  const active = document.activeElement;
  const isField = part.contains(active) && /^(INPUT|TEXTAREA|SELECT|BUTTON|SUMMARY)$/.test(active.tagName);
  return isField || (part.querySelector("form") !== null && part.matches(":hover"));
}

// Put another in the place of a part, with the focus and the scrolling of tables as they were.
function exchange(part, other) {
  const places = "a, [tabindex]";
  const focused = [...part.querySelectorAll(places)].indexOf(document.activeElement);
  const scrolled = [...part.querySelectorAll(".wide")].map((table) => table.scrollLeft);
  part.replaceWith(other);
  other.querySelectorAll(".wide").forEach((table, place) => { table.scrollLeft = scrolled[place] || 0; });
  if (focused >= 0) other.querySelectorAll(places)[focused]?.focus({ preventScroll: true });
}

// Replace the parts that are marked as live by those of the same page as it is now.
async function refresh() {
  const live = document.querySelectorAll("[data-live]");
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (answer.redirected) return location.reload();
  if (!answer.ok) throw new Error(answer.statusText);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of live) {
    const other = fresh.getElementById(part.id);
    if (!other || isInUse(part)) continue;
    localize(other);
    if (other.innerHTML !== part.innerHTML || other.className !== part.className) exchange(part, other);
  }
}

function keepFresh(seconds) {
  setTimeout(async () => {
    let next = REFRESH_SECONDS;
    if (!document.hidden) {
      try {
        await refresh();
        document.documentElement.classList.remove("stale");
      } catch {
        // The page shows that it is old, and asks ever more seldom.
        document.documentElement.classList.add("stale");
        next = Math.min(seconds * 2, REFRESH_SECONDS_MAX);
      }
    }
    keepFresh(next);
  }, seconds * 1000);
}

document.addEventListener("keydown", (event) => {
  const find = document.getElementById("find");
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "/" && !typing && find && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    find.focus();
    find.select();
  } else if (event.key === "Escape") {
    for (const open of document.querySelectorAll("header details[open]")) open.open = false;
    if (event.target === find) find.blur();
  }
});

localize(document);
for (const zone of document.querySelectorAll("[data-zone]")) {
  zone.textContent = Intl.DateTimeFormat().resolvedOptions().timeZone + ", UTC on hover";
}

// After a link from another site the browser sends the cookie only with what this page asks for.
async function goOn(link) {
  const answer = await fetch(link.href, { headers: { Accept: "text/html" } });
  if (answer.ok && !answer.redirected) location.replace(link.href);
}

const again = document.querySelector("[data-again]");
if (again) goOn(again).catch(() => {});
if (document.querySelector("[data-live]")) keepFresh(REFRESH_SECONDS);
