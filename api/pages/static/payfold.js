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

// Replace the parts that are marked as live by those of the same page as it is now.
async function refresh() {
  const live = document.querySelectorAll("[data-live]");
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (answer.redirected) return location.reload();
  if (!answer.ok) throw new Error(answer.statusText);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of live) {
    const other = fresh.getElementById(part.id);
    // What a person is using stays as it is.
    if (!other || part.contains(document.activeElement)) continue;
    localize(other);
    if (other.innerHTML !== part.innerHTML || other.className !== part.className) part.replaceWith(other);
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
if (document.querySelector("[data-live]")) keepFresh(REFRESH_SECONDS);
