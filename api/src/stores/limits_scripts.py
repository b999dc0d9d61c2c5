"""The laws of limits.py as Lua scripts: Redis runs each as one step, by its own clock.

Each subject has two keys, a hash and a sorted set. The hash holds `weight` and `at` of the bucket, `day`, `used`,
`reserved` and `alerted` of the day, and `p:<id>` = `<day>:<characters>` for each place that is taken; the set holds
when the lease of each place runs out. An empty first argument means Redis's clock; tests give a time of their own.
"""

from __future__ import annotations

_CLOCK = """
local function clock(given)
  if given ~= '' then return tonumber(given) end
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end
local now = clock(ARGV[1])
"""

ENTER = (
    _CLOCK
    + """
-- ARGV: time, id, lease, characters, milliseconds that a key is kept, and four caps a subject
local id, lease, asked, kept = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local MINUTE, today = 60000000, math.floor(now / 86400000000)

local function reclaim(hash, places, day)
  local back = 0
  for _, lapsed in ipairs(redis.call('ZRANGEBYSCORE', places, '-inf', now)) do
    local held = redis.call('HGET', hash, 'p:' .. lapsed)
    redis.call('ZREM', places, lapsed)
    redis.call('HDEL', hash, 'p:' .. lapsed)
    local since, characters = string.match(held or '', '^(%d+):(%d+)$')
    if tonumber(since) == day and day then back = back + tonumber(characters) end
  end
  if back > 0 then redis.call('HINCRBY', hash, 'reserved', -back) end
end

local rows, fits = {}, true
for i = 1, #KEYS / 2 do
  local row = {hash = KEYS[2 * i - 1], places = KEYS[2 * i], rate = tonumber(ARGV[4 * i + 2])}
  local room, quota, alert = tonumber(ARGV[4 * i + 3]), tonumber(ARGV[4 * i + 4]), tonumber(ARGV[4 * i + 5])
  row.lasting = room > 0 or quota > 0 or alert > 0
  local day = tonumber(redis.call('HGET', row.hash, 'day') or nil)
  reclaim(row.hash, row.places, day)
  local field = redis.call('HMGET', row.hash, 'weight', 'at', 'used', 'reserved')
  row.new_day = day ~= today
  row.used = row.new_day and 0 or tonumber(field[3]) or 0
  row.reserved = row.new_day and 0 or tonumber(field[4]) or 0
  local elapsed = math.max(0, math.min(now - (tonumber(field[2]) or 0), MINUTE))
  row.weight = math.max(0, (tonumber(field[1]) or 0) - row.rate * elapsed)
  row.running = redis.call('ZCARD', row.places)
  if (row.rate > 0 and row.weight + MINUTE > row.rate * MINUTE) or (room > 0 and row.running >= room)
      or (quota > 0 and row.used + row.reserved + asked > quota) then
    fits = false
  end
  rows[i] = row
end

local reply = {now, fits and 1 or 0}
for _, row in ipairs(rows) do
  if fits and row.rate > 0 then
    row.weight = row.weight + MINUTE
    redis.call('HSET', row.hash, 'weight', row.weight, 'at', now)
  end
  if fits and row.lasting then
    if row.new_day then redis.call('HDEL', row.hash, 'alerted') end
    row.reserved, row.running = row.reserved + asked, row.running + 1
    redis.call('HSET', row.hash, 'day', today, 'used', row.used, 'reserved', row.reserved,
               'p:' .. id, string.format('%.0f:%.0f', today, asked))
    redis.call('ZADD', row.places, now + lease, id)
    redis.call('PEXPIRE', row.places, kept)
  end
  if fits then redis.call('PEXPIRE', row.hash, kept) end
  reply[#reply + 1] = row.weight
  reply[#reply + 1] = row.running
  reply[#reply + 1] = row.used + row.reserved
end
return reply
"""
)
"""Answers: the time, 1 if admitted else 0, and weight, running and characters of each subject."""

LEAVE = """
-- ARGV: id, characters that count, and one threshold of alert a subject
local id, counted, reply = ARGV[1], tonumber(ARGV[2]), {}
for i = 1, #KEYS / 2 do
  local hash, places, alert = KEYS[2 * i - 1], KEYS[2 * i], tonumber(ARGV[2 + i])
  local held = redis.call('HGET', hash, 'p:' .. id)
  local since, characters = string.match(held or '', '^(%d+):(%d+)$')
  local alarm, day = 0, redis.call('HGET', hash, 'day') or '0'
  redis.call('ZREM', places, id)
  redis.call('HDEL', hash, 'p:' .. id)
  if since and since == day then
    redis.call('HINCRBY', hash, 'reserved', -tonumber(characters))
    local used = redis.call('HINCRBY', hash, 'used', counted)
    if alert > 0 and used > alert and redis.call('HSETNX', hash, 'alerted', 1) == 1 then alarm = used end
  end
  reply[#reply + 1] = alarm
  reply[#reply + 1] = tonumber(day)
end
return reply
"""
"""Answers for each subject: its characters if they have passed the threshold just now, else 0; and the day."""

RENEW = (
    _CLOCK
    + """
-- ARGV: time, lease, ids of places that are still taken; one that has lapsed meanwhile does not come back
for i = 3, #ARGV do redis.call('ZADD', KEYS[1], 'XX', now + tonumber(ARGV[2]), ARGV[i]) end
return 0
"""
)
