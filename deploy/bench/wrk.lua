-- Sends each prepared request once, on as many connections as wrk has, and prints what came back.
-- wrk itself counts until its time is up, and forgets what is in flight then; here every answer is waited for.
local ffi = require("ffi")
ffi.cdef [[
typedef struct { long seconds; long nanoseconds; } payfold_time;
int clock_gettime(int clock, payfold_time *time);
]]

local COUNT, MONOTONIC, NOT_ALLOWED = $count, 1, 405
-- What a connection sends when no prepared request is left; it is answered at once and counts for nothing.
local FILLER = "GET $path HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

local time = ffi.new("payfold_time")
local function now()
   ffi.C.clock_gettime(MONOTONIC, time)
   return tonumber(time.seconds) + tonumber(time.nanoseconds) / 1e9
end

local requests = assert(io.open("$requests", "rb"))
local is_tried, begun, left, answered, accepted = false, 0, COUNT, 0, 0

function request()
   -- wrk asks once before it begins, only to look at what it gets.
   if not is_tried then
      is_tried = true
      return FILLER
   end
   if left == 0 then
      return FILLER
   end
   if left == COUNT then
      begun = now()
   end
   left = left - 1
   local size = requests:read("*n")
   requests:read(1)
   local found = requests:read(size)
   requests:read(1)
   return found
end

function response(status)
   if status == NOT_ALLOWED then
      return
   end
   answered = answered + 1
   if status == 200 then
      accepted = accepted + 1
   end
   if answered == COUNT then
      io.stdout:write(string.format(
         '{"accepted": %d, "refused": %d, "seconds": %.6f, "client": "wrk"}\n', accepted, COUNT - accepted, now() - begun))
      io.stdout:flush()
      os.exit(0)
   end
end
