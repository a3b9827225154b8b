// SPDX-License-Identifier: Apache-2.0
#include "daemon/device_mapper.h"

#include <cerrno>
#include <cinttypes>
#include <cstring>
#include <memory>
#include <mutex>

#include <libdevmapper.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "blockio/base/clock.h"
#include "blockio/block_identity.h"

namespace blockferry {

namespace {

constexpr unsigned remove_tries = 100;
constexpr Nanoseconds remove_pause = std::chrono::milliseconds(20);

/// The library has one descriptor and one set of options for the whole process.
std::mutex& library_mutex() {
  static std::mutex mutex;
  return mutex;
}

/// Errors are values here.
void say_nothing(int, const char*, int, int, const char*, ...) {}

void set_up_library() {
  dm_log_with_errno_init(say_nothing);
  // udev is told to leave our maps alone, and nobody waits for it: nodes are devtmpfs's.
  dm_udev_set_sync_support(0);
}

using Task = std::unique_ptr<dm_task, void (*)(dm_task*)>;

Task new_task(int type) {
  static std::once_flag once;
  std::call_once(once, set_up_library);
  return {dm_task_create(type), dm_task_destroy};
}

Error map_error(const Task& task, const char* operation, const std::string& what) {
  const int why = task != nullptr ? dm_task_get_errno(task.get()) : ENOMEM;
  return error_from_errno(why != 0 ? why : EIO, operation, what);
}

std::string sysfs_line(dev_t device, const char* file) {
  return read_line("/sys/dev/block/" + std::to_string(major(device)) + ":" + std::to_string(minor(device)) +
                   "/dm/" + file);
}

bool exists(const std::string& name) {
  const Task task = new_task(DM_DEVICE_INFO);
  dm_info info{};
  return task != nullptr && dm_task_set_name(task.get(), name.c_str()) != 0 && dm_task_run(task.get()) != 0 &&
         dm_task_get_info(task.get(), &info) != 0 && info.exists != 0;
}

/// With the library's mutex held, as below.
Result<MapTable> table_of(const Task& task, const std::string& what) {
  if (task == nullptr || dm_task_run(task.get()) == 0)
    return fail(map_error(task, "read the table of", what));
  MapTable table;
  void* next = nullptr;
  do {
    std::uint64_t start = 0, length = 0;
    char *type = nullptr, *parameters = nullptr;
    next = dm_get_next_target(task.get(), next, &start, &length, &type, &parameters);
    if (type != nullptr) table.push_back({start, length, type, parameters != nullptr ? parameters : ""});
  } while (next != nullptr);
  return table;
}

bool remove_once(const std::string& name) {
  const Task task = new_task(DM_DEVICE_REMOVE);
  std::uint32_t cookie = 0;
  return task != nullptr && dm_task_set_name(task.get(), name.c_str()) != 0 &&
         dm_task_set_cookie(task.get(), &cookie, DM_UDEV_DISABLE_LIBRARY_FALLBACK) != 0 &&
         dm_task_run(task.get()) != 0;
}

void remove_patiently(const std::string& name) {
  for (unsigned i = 0; i < remove_tries && exists(name) && !remove_once(name); ++i)
    system_clock().sleep_for(remove_pause);
}

Result<dev_t> device_of(const std::string& name) {
  const Task task = new_task(DM_DEVICE_INFO);
  dm_info info{};
  if (task == nullptr || dm_task_set_name(task.get(), name.c_str()) == 0 || dm_task_run(task.get()) == 0 ||
      dm_task_get_info(task.get(), &info) == 0 || info.exists == 0)
    return fail(map_error(task, "look at the map", name));
  return makedev(info.major, info.minor);
}

Result<void> create(const std::string& name, const MapTable& table) {
  constexpr std::uint16_t leave_alone = DM_UDEV_DISABLE_DISK_RULES_FLAG | DM_UDEV_DISABLE_OTHER_RULES_FLAG |
                                        DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG | DM_UDEV_DISABLE_DM_RULES_FLAG |
                                        DM_UDEV_DISABLE_LIBRARY_FALLBACK;
  const Task task = new_task(DM_DEVICE_CREATE);
  std::uint32_t cookie = 0;
  bool set = task != nullptr && dm_task_set_name(task.get(), name.c_str()) != 0 &&
             dm_task_set_uuid(task.get(), name.c_str()) != 0 &&
             dm_task_set_cookie(task.get(), &cookie, leave_alone) != 0;
  for (const auto& line : table) {
    set = set && dm_task_add_target(task.get(), line.start, line.sectors, line.type.c_str(),
                                    line.parameters.c_str()) != 0;
  }
  if (!set || dm_task_run(task.get()) == 0) return fail(map_error(task, "make the map", name));
  return {};
}

}  // namespace

std::string map_name(dev_t device) {
  return sysfs_line(device, "name");
}

std::string map_uuid(dev_t device) {
  return sysfs_line(device, "uuid");
}

Result<MapTable> live_table(dev_t device) {
  const std::lock_guard lock(library_mutex());
  const Task task = new_task(DM_DEVICE_TABLE);
  if (task != nullptr) {
    dm_task_set_major(task.get(), int(major(device)));
    dm_task_set_minor(task.get(), int(minor(device)));
  }
  return table_of(task, device_node(device));
}

Result<dev_t> make_private_map(const std::string& name, const MapTable& table) {
  const std::lock_guard lock(library_mutex());
  if (exists(name)) {
    const Task task = new_task(DM_DEVICE_TABLE);
    if (task != nullptr) dm_task_set_name(task.get(), name.c_str());
    const auto found = table_of(task, name);
    if (found && *found == table) return device_of(name);
    remove_patiently(name);
  }
  if (auto done = create(name, table); !done) return fail(done.error());
  return device_of(name);
}

void remove_private_map(const std::string& name) {
  const std::lock_guard lock(library_mutex());
  remove_patiently(name);
}

std::vector<std::string> private_maps(const std::string& prefix) {
  std::vector<std::string> names;
  // Without device-mapper, asking would load the module.
  if (::access("/sys/module/dm_mod", F_OK) != 0) return names;
  const std::lock_guard lock(library_mutex());
  const Task task = new_task(DM_DEVICE_LIST);
  if (task == nullptr || dm_task_run(task.get()) == 0) return names;
  const dm_names* each = dm_task_get_names(task.get());
  while (each != nullptr && each->dev != 0) {
    if (std::strncmp(each->name, prefix.c_str(), prefix.size()) == 0) names.emplace_back(each->name);
    if (each->next == 0) break;
    each = reinterpret_cast<const dm_names*>(reinterpret_cast<const char*>(each) + each->next);
  }
  return names;
}

}  // namespace blockferry
