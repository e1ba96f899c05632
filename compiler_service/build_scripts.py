"""The build queue's Lua: each script is one check and one write that Redis runs as one.

The keys are those at the head of build_queue.py. A record is only ever written here. `owner` and
`fence` are the right to write: every attempt takes the next fence of its record, so that a worker
that was taken for dead, and comes back, is refused.
"""

_PRELUDE = """
local GROUP = 'workers'

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- An empty Redis (restarted without its data) has no group.
local function ensure_group(builds)
  local made = redis.pcall('XGROUP', 'CREATE', builds, GROUP, '0', 'MKSTREAM')
  if made['err'] and not string.find(made['err'], 'BUSYGROUP') then error(made['err']) end
end

local function holder(builds, entry)
  local pending = redis.call('XPENDING', builds, GROUP, entry, entry, 1)
  return pending[1] and pending[1][2]
end

-- Makes an entry claimable at once.
local function put_back(builds, entry)
  redis.call('XCLAIM', builds, GROUP, 'returned', 0, entry, 'IDLE', 86400000, 'JUSTID')
end

local function remove(builds, entry)
  redis.call('XACK', builds, GROUP, entry)
  redis.call('XDEL', builds, entry)
end

-- Wakes watchers, and keeps the record for `kept_s` from now.
local function tell(record, kept_s)
  local events = record .. ':events'
  redis.call('XADD', events, 'MAXLEN', '~', 64, '*', 'state', redis.call('HGET', record, 'state'))
  redis.call('EXPIRE', events, kept_s)
  redis.call('EXPIRE', record, kept_s)
end

-- Newest first by score; microseconds, made unique, so that a score is a page token.
local function index(builds, digest, kept_s)
  local key = builds .. ':index'
  local t = redis.call('TIME')
  local last = redis.call('ZREVRANGE', key, 0, 0, 'WITHSCORES')[2]
  local score = math.max(t[1] * 1000000 + t[2], (tonumber(last) or 0) + 1)
  redis.call('ZADD', key, string.format('%.0f', score), digest)
  redis.call('ZREMRANGEBYRANK', key, 0, -10001)
  redis.call('EXPIRE', key, kept_s)
end

local function clear_progress(record)
  redis.call('HDEL', record, 'stage', 'fraction', 'done_bytes', 'total_bytes', 'eta_s')
end

-- Redis lost its data since the attempt began: its worker knows the build.
local function register(builds, record, digest, job, kept_s)
  redis.call('HSET', record, 'job', job, 'create_ms', now_ms())
  index(builds, digest, kept_s)
end

-- Redis lost its data since the attempt of this fence began, and the build was asked for again: it is that one.
local function is_asked_anew(state, its_fence, fence)
  return state == 'QUEUED' and tonumber(its_fence) < tonumber(fence)
end

local function finish(record, state, kept_s)
  clear_progress(record)
  redis.call('HDEL', record, 'cancel')
  redis.call('HSET', record, 'state', state, 'end_ms', now_ms())
  tell(record, kept_s)
end
"""

# KEYS builds, record...  ARGV max_queued, kept_s, (digest, job)...
# -> {'ok'} or {'full', waiting}
ENQUEUE = (
    _PRELUDE
    + """
local builds, kept_s = KEYS[1], ARGV[2]
ensure_group(builds)
local fresh, digests = {}, {}
for i = 2, #KEYS do
  local r = redis.call('HMGET', KEYS[i], 'state', 'entry')
  local is_alive = (r[1] == 'QUEUED' or r[1] == 'RUNNING')
    and #redis.call('XRANGE', builds, r[2], r[2]) > 0
  if is_alive then
    redis.call('HDEL', KEYS[i], 'cancel')  -- the latest wish wins
  else
    fresh[#fresh + 1] = i
    digests[#digests + 1] = ARGV[2 * i - 1]
  end
end
if #fresh == 0 then return {'ok'} end
local waiting = redis.call('XLEN', builds) - redis.call('XPENDING', builds, GROUP)[1]
if waiting >= tonumber(ARGV[1]) then return {'full', waiting} end
local entry = redis.call('XADD', builds, '*', 'digests', table.concat(digests, ','))
for _, i in ipairs(fresh) do
  local record, digest, job = KEYS[i], ARGV[2 * i - 1], ARGV[2 * i]
  local fence = redis.call('HGET', record, 'fence') or '0'
  redis.call('DEL', record)
  redis.call('HSET', record, 'job', job, 'state', 'QUEUED', 'entry', entry, 'fence', fence,
    'attempt', 0, 'create_ms', now_ms())
  index(builds, digest, kept_s)
  tell(record, kept_s)
end
return {'ok'}
"""
)

# KEYS builds, record  ARGV owner, entry, lease_ms, max_attempts, kept_s
# -> {'ok' | 'lost', fence, attempt, job, stage} or {'ended' | 'busy' | 'refused'}
START = (
    _PRELUDE
    + """
local builds, record = KEYS[1], KEYS[2]
local owner, entry, kept_s = ARGV[1], ARGV[2], ARGV[5]
ensure_group(builds)
local r = redis.call('HMGET', record, 'state', 'entry', 'owner', 'beat_ms', 'job', 'stage',
  'attempt')
local state = r[1]
if (state ~= 'QUEUED' and state ~= 'RUNNING') or r[2] ~= entry then return {'ended'} end
if holder(builds, entry) ~= owner then return {'refused'} end
if state == 'RUNNING' and r[3] ~= owner and now_ms() - r[4] < tonumber(ARGV[3]) then
  -- Registered anew by its worker after Redis lost its data, and then read by us.
  redis.call('XCLAIM', builds, GROUP, r[3], 0, entry, 'JUSTID')
  return {'busy'}
end
if redis.call('HEXISTS', record, 'cancel') == 1 then
  finish(record, 'CANCELLED', kept_s)
  return {'ended'}
end
local fence = redis.call('HINCRBY', record, 'fence', 1)
local is_lost = tonumber(r[7]) >= tonumber(ARGV[4])
local attempt = is_lost and r[7] or redis.call('HINCRBY', record, 'attempt', 1)
clear_progress(record)
redis.call('HSET', record, 'state', 'RUNNING', 'owner', owner, 'beat_ms', now_ms(),
  'start_ms', now_ms())
tell(record, kept_s)
return {is_lost and 'lost' or 'ok', fence, attempt, r[5], r[6] or ''}
"""
)

# Heartbeat and progress. Progress fields follow as (name, value) pairs; none is a bare heartbeat.
# KEYS builds, record  ARGV owner, fence, kept_s, digest, job, attempt, (field, value)...
# -> 'ok' | 'cancel' | 'refused'
BEAT = (
    _PRELUDE
    + """
local builds, record = KEYS[1], KEYS[2]
local owner, fence, kept_s = ARGV[1], ARGV[2], ARGV[3]
ensure_group(builds)
local r = redis.call('HMGET', record, 'state', 'owner', 'fence', 'entry', 'cancel')
local is_changed = #ARGV > 6
if not r[1] then
  r[4] = redis.call('XADD', builds, '*', 'digests', ARGV[4])
  redis.call('HSET', record, 'entry', r[4])
  register(builds, record, ARGV[4], ARGV[5], kept_s)
elseif not (r[1] == 'RUNNING' and r[2] == owner and r[3] == fence)
  and not is_asked_anew(r[1], r[3], fence) then
  return 'refused'
end
if r[1] ~= 'RUNNING' then
  redis.call('HSET', record, 'state', 'RUNNING', 'owner', owner, 'fence', fence,
    'attempt', ARGV[6], 'start_ms', now_ms())
  is_changed = true
end
redis.call('HSET', record, 'beat_ms', now_ms(), unpack(ARGV, 7))
redis.call('XCLAIM', builds, GROUP, owner, 0, r[4], 'JUSTID')
redis.call('EXPIRE', record, kept_s)
if is_changed then tell(record, kept_s) end
return r[5] and 'cancel' or 'ok'
"""
)

# KEYS builds, record  ARGV owner, fence, kept_s, digest, job, attempt, state, (field, value)...
# -> 'ok' | 'refused' | 'wanted' (to be cancelled, but asked for again meanwhile)
FINISH = (
    _PRELUDE
    + """
local builds, record = KEYS[1], KEYS[2]
local owner, fence, kept_s, state = ARGV[1], ARGV[2], ARGV[3], ARGV[7]
local r = redis.call('HMGET', record, 'state', 'owner', 'fence', 'cancel')
local is_anew = r[1] and is_asked_anew(r[1], r[3], fence)
if not r[1] then
  register(builds, record, ARGV[4], ARGV[5], kept_s)
elseif not is_anew then
  if r[2] ~= owner or r[3] ~= fence then return 'refused' end
  if r[1] == state then return 'ok' end  -- sent twice
  if r[1] ~= 'RUNNING' then return 'refused' end
end
if r[1] and state == 'CANCELLED' and not r[4] then return 'wanted' end
redis.call('HSET', record, 'owner', owner, 'fence', fence, 'attempt', ARGV[6], unpack(ARGV, 8))
finish(record, state, kept_s)
return 'ok'
"""
)

# Returns a running build to the queue as if this attempt had not been.
# KEYS builds, record  ARGV owner, fence, kept_s, digest, job, attempt
GIVE_BACK = (
    _PRELUDE
    + """
local builds, record = KEYS[1], KEYS[2]
local owner, fence, kept_s = ARGV[1], ARGV[2], ARGV[3]
ensure_group(builds)
local r = redis.call('HMGET', record, 'state', 'owner', 'fence', 'entry')
if not r[1] then
  local entry = redis.call('XADD', builds, '*', 'digests', ARGV[4])
  redis.call('HSET', record, 'entry', entry, 'fence', fence)
  register(builds, record, ARGV[4], ARGV[5], kept_s)
elseif is_asked_anew(r[1], r[3], fence) then
  return 'ok'  -- it waits already
elseif r[1] ~= 'RUNNING' or r[2] ~= owner or r[3] ~= fence then
  return 'refused'
else
  put_back(builds, r[4])
end
clear_progress(record)
redis.call('HDEL', record, 'owner', 'beat_ms', 'start_ms')
redis.call('HSET', record, 'state', 'QUEUED', 'attempt', ARGV[6] - 1)
tell(record, kept_s)
return 'ok'
"""
)

# KEYS builds  ARGV owner, entry
CLOSE = (
    _PRELUDE
    + """
ensure_group(KEYS[1])
if holder(KEYS[1], ARGV[2]) == ARGV[1] then remove(KEYS[1], ARGV[2]) end
return 'ok'
"""
)

# KEYS builds  ARGV owner
LEAVE = (
    _PRELUDE
    + """
ensure_group(KEYS[1])
for _, pending in ipairs(redis.call('XPENDING', KEYS[1], GROUP, '-', '+', 1000, ARGV[1])) do
  put_back(KEYS[1], pending[1])
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], GROUP, ARGV[1])
return 'ok'
"""
)

# KEYS builds, record  ARGV kept_s  -> 1 if the record exists
CANCEL = (
    _PRELUDE
    + """
local builds, record = KEYS[1], KEYS[2]
local r = redis.call('HMGET', record, 'state', 'entry')
if not r[1] then return 0 end
if r[1] == 'RUNNING' then
  redis.call('HSET', record, 'cancel', 1)
elseif r[1] == 'QUEUED' then
  finish(record, 'CANCELLED', ARGV[1])
  local entry = redis.call('XRANGE', builds, r[2], r[2])[1]
  -- An entry of several builds is removed by the worker that gets it.
  if entry and not string.find(entry[2][2], ',') then remove(builds, r[2]) end
end
return 1
"""
)

# Removes consumers of workers that are gone and hold nothing.
# KEYS builds  ARGV idle_ms
FORGET_WORKERS = (
    _PRELUDE
    + """
ensure_group(KEYS[1])
for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], GROUP)) do
  local consumer = {}
  for i = 1, #row, 2 do consumer[row[i]] = row[i + 1] end
  if consumer['pending'] == 0 and consumer['idle'] > tonumber(ARGV[1]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], GROUP, consumer['name'])
  end
end
return 'ok'
"""
)
