//! What the owner answers to the API: each request in each state.
//!
//! A request that does not fit the state is refused and changes nothing. What a client asked for is checked again here
//! like a word of the command line; nothing is trusted because it came through the socket.

use std::sync::Arc;

use event_manager::EventOps;

use super::Ending;
use super::owner::{Owner, State};
use super::processors::ResizeVcpusError;
use super::vm::{AddError, NewDevice, ResizeDiskError, RunningVm};
use crate::api::{Answer, ApiError, Call, DeviceAdded, ErrorKind, Reply, Request, VmInfo, VmState};
use crate::config::{ConfigError, VmConfig};
use crate::monitor::Event;
use crate::virtio::blk::DiskResizeError;

/// Done, and nothing to say.
const DONE: Answer = Ok(Reply::Empty);

impl Owner {
    /// Does what was asked and says how it went: now, or when a drain is over.
    pub(super) fn serve(&mut self, Call { request, reply }: Call, ops: &mut EventOps<'_>) {
        let answer = match request {
            Request::Info => self.info(),
            Request::Counters => self.counters(),
            Request::Regions => self.regions(),
            Request::Metrics => {
                self.publish();
                DONE
            }
            Request::VmmShutdown => {
                self.end(Ok(Ending::Asked));
                DONE
            }
            Request::Create(config) => self.create(config),
            Request::Boot => self.boot(ops),
            Request::Shutdown => self.shutdown(ops),
            Request::Delete => self.delete(ops),
            Request::Reboot => self.reboot(ops),
            Request::Pause => self.pause(),
            Request::Resume => self.resume(),
            Request::PowerButton => self.power_button(),
            Request::Nmi => self.nmi(),
            Request::AddPmem(word) => self.add(NewDevice::Pmem(*word)),
            Request::AddDisk(word) => self.add(NewDevice::Disk(*word)),
            Request::AddNet(word, fds) => self.add(NewDevice::Net(*word, fds)),
            Request::AddFs(word) => self.add(NewDevice::Fs(*word)),
            Request::AddGenericVhostUser(word) => self.add(NewDevice::GenericVhostUser(*word)),
            Request::AddVsock(word) => self.add(NewDevice::Vsock(*word)),
            Request::AddDevice(word) => self.add(NewDevice::Passthrough(*word)),
            Request::RemoveDevice { id } => self.remove_device(&id),
            Request::Drain { id } => return self.drain(&id, reply),
            Request::ResizeDisk { id, bytes } => self.resize_disk(&id, bytes),
            Request::Resize {
                vcpus,
                ram,
                balloon,
            } => self.resize(vcpus, ram, balloon),
        };
        // A client that has gone needs none.
        let _ = reply.send(answer);
    }

    /// The machine that is up, running or paused.
    pub(super) fn up(&mut self) -> Result<&mut RunningVm, ApiError> {
        match &mut self.state {
            State::Up(vm) => Ok(vm),
            State::Created(_) => Err(wrong_state("the VM is not booted; vm.boot starts it")),
            State::NoVm => Err(no_vm()),
        }
    }

    fn defined(&self) -> Result<(), ApiError> {
        match self.state {
            State::NoVm => Err(no_vm()),
            State::Created(_) | State::Up(_) => Ok(()),
        }
    }

    fn create(&mut self, config: Box<VmConfig>) -> Answer {
        if !matches!(self.state, State::NoVm) {
            return Err(wrong_state("a VM exists already; vm.delete removes it"));
        }
        // Kept as it was sent, ids and all; checked now so that the client learns of it now.
        let valid = config
            .validate()
            .map_err(|error| ApiError::from_error(ErrorKind::BadRequest, &error))?;
        self.state = State::Created(Box::new(valid.config().clone()));
        DONE
    }

    fn boot(&mut self, ops: &mut EventOps<'_>) -> Answer {
        let config = match &self.state {
            State::Created(config) => config.as_ref().clone(),
            State::Up(_) => return Err(wrong_state("the VM is booted already")),
            State::NoVm => return Err(no_vm()),
        };
        self.monitor.send(&Event::Booting);
        self.metrics.booting();
        let valid = config
            .validate()
            .map_err(|error| ApiError::from_error(ErrorKind::Internal, &error))?;
        let vm = RunningVm::boot(
            valid,
            Arc::clone(&self.pools),
            (&self.monitor, &self.metrics),
            &mut self.removals,
            self.signals.told(),
            &self.taps,
        )
        .map_err(|error| ApiError::from_error(ErrorKind::Internal, &error))?;
        self.state = State::Up(Box::new(vm));
        self.watch(ops);
        self.monitor.send(&Event::Booted);
        DONE
    }

    fn shutdown(&mut self, ops: &mut EventOps<'_>) -> Answer {
        self.up()?;
        self.shut_down(ops);
        DONE
    }

    fn delete(&mut self, ops: &mut EventOps<'_>) -> Answer {
        self.defined()?;
        self.shut_down(ops);
        self.state = State::NoVm;
        self.monitor.send(&Event::Deleted);
        DONE
    }

    fn power_button(&mut self) -> Answer {
        self.up()?.machine.power_button();
        DONE
    }

    fn nmi(&mut self) -> Answer {
        self.up()?.machine.nmi();
        DONE
    }

    /// A guest whose RAM is gone starts on what the host has now.
    fn reboot(&mut self, ops: &mut EventOps<'_>) -> Answer {
        if !self.up()?.lost.is_empty() {
            self.shut_down(ops);
            return self.boot(ops);
        }
        self.reset(ops).map_err(|error| {
            let answer = ApiError::from_error(ErrorKind::Internal, &error);
            // The machine is gone; what is left to say goes with the process.
            self.end(Err(error));
            answer
        })?;
        DONE
    }

    fn pause(&mut self) -> Answer {
        let vm = self.up()?;
        if vm.is_paused() {
            return Err(wrong_state("the VM is paused already"));
        }
        self.monitor.send(&Event::Pausing);
        self.up()?
            .pause()
            .map_err(|error| ApiError::from_error(ErrorKind::Internal, &error))?;
        self.monitor.send(&Event::Paused);
        DONE
    }

    fn resume(&mut self) -> Answer {
        let vm = self.up()?;
        if !vm.is_paused() {
            return Err(wrong_state("the VM is not paused"));
        }
        if let Some(lost) = vm.lost.first() {
            return Err(wrong_state(&format!(
                "{lost}; a guest without it can't go on: vm.reboot starts it anew when the memory is back, vm.shutdown \
                 and vm.delete take it down"
            )));
        }
        self.monitor.send(&Event::Resuming);
        self.up()?.resume();
        self.monitor.send(&Event::Resumed);
        DONE
    }

    /// A running guest gets the device now, a defined one when it boots.
    fn add(&mut self, new: NewDevice) -> Answer {
        match &mut self.state {
            State::NoVm => Err(no_vm()),
            State::Created(config) => {
                let mut changed = config.as_ref().clone();
                let tap = new.put_into(&mut changed)?;
                let valid = changed
                    .validate()
                    .map_err(|error| ApiError::from_error(why_not_added(&error), &error))?;
                **config = valid.config().clone();
                if let Some(id) = config.net.last().and_then(|net| net.id.as_deref()) {
                    // None unless it is what was added.
                    self.taps.keep(id, tap);
                }
                DONE
            }
            State::Up(vm) => {
                let tap = new.tap().map_err(|error| {
                    let what = "the descriptors of the tap can't be duplicated; `ulimit -n` raises how many there may be";
                    ApiError::caused_by(ErrorKind::Internal, what, &error)
                })?;
                let (id, bdf) = vm.add(new, &mut self.removals).map_err(|error| {
                    let kind = match &error {
                        AddError::Config(error) => why_not_added(error),
                        AddError::Second { .. } => ErrorKind::BadRequest,
                        _ => ErrorKind::Internal,
                    };
                    ApiError::from_error(kind, &error)
                })?;
                self.taps.keep(&id, tap);
                Reply::json(&DeviceAdded {
                    id,
                    bdf: bdf.to_string(),
                })
            }
        }
    }

    fn remove_device(&mut self, id: &str) -> Answer {
        match &mut self.state {
            State::NoVm => Err(no_vm()),
            State::Created(config) => {
                if config.remove_device(id) {
                    DONE
                } else {
                    Err(ApiError::new(
                        ErrorKind::NotFound,
                        format!("the VM has no device with id {id}; vm.info lists them"),
                    ))
                }
            }
            State::Up(vm) => {
                vm.request_removal(id).map_err(|error| {
                    let kind = match error {
                        super::devices::RemoveError::Unknown(_) => ErrorKind::NotFound,
                        super::devices::RemoveError::Leaving { .. } => ErrorKind::WrongState,
                    };
                    ApiError::from_error(kind, &error)
                })?;
                self.settle();
                DONE
            }
        }
    }

    fn resize_disk(&mut self, id: &str, bytes: u64) -> Answer {
        self.up()?;
        self.monitor.send(&Event::Resizing);
        let resized = self.up()?.resize_disk(id, bytes);
        if resized.is_ok() {
            self.monitor.send(&Event::Resized);
        }
        resized.map(|()| Reply::Empty).map_err(|error| {
            let kind = match &error {
                ResizeDiskError::Unknown(_) => ErrorKind::NotFound,
                ResizeDiskError::Disk {
                    source: DiskResizeError::File(_),
                    ..
                } => ErrorKind::Internal,
                ResizeDiskError::Disk { .. } => ErrorKind::BadRequest,
            };
            ApiError::from_error(kind, &error)
        })
    }

    /// What can't be done is refused before anything is.
    fn resize(&mut self, vcpus: Option<u32>, ram: Option<u64>, balloon: Option<u64>) -> Answer {
        let vm = self.up()?;
        if ram.is_some_and(|asked| asked != vm.ram_bytes()) {
            return Err(ApiError::not_supported("vm.resize desired_ram"));
        }
        if let Some(asked) = vcpus {
            vm.check_vcpus(asked).map_err(|e| refused_vcpus(&e))?;
        }
        if let Some(bytes) = balloon {
            vm.resize_balloon(bytes)
                .map_err(|error| ApiError::from_error(ErrorKind::BadRequest, &error))?;
        }
        self.monitor.send(&Event::Resizing);
        let resized = match vcpus {
            None => Ok(true),
            Some(asked) => self.up()?.resize_vcpus(asked),
        };
        // Looks again until the guest has answered.
        self.settle();
        if resized.map_err(|e| refused_vcpus(&e))? {
            self.monitor.send(&Event::Resized);
        }
        DONE
    }

    fn info(&self) -> Answer {
        let (config, vm) = match &self.state {
            State::NoVm => return Err(no_vm()),
            State::Created(config) => (config.as_ref(), None),
            State::Up(vm) => (vm.config(), Some(vm)),
        };
        let mut told = serde_json::to_value(VmInfo {
            config,
            state: match vm {
                None => VmState::Created,
                Some(vm) if vm.is_paused() => VmState::Paused,
                Some(_) => VmState::Running,
            },
            memory_actual_size: vm.map_or(0, |vm| vm.memory_actual_bytes()),
            device_tree: vm.map(|vm| vm.device_tree()),
            dax_memory: vm.map(|vm| vm.dax_memory()),
            memory_leaving: vm.map(|vm| vm.regions.tree()),
            poison: vm.map(|vm| vm.poison()),
            devices_kept: vm.map_or_else(Vec::new, |vm| vm.host.kept().collect()),
            paused_because: vm.and_then(|vm| vm.lost.first()).map(ToString::to_string),
        })
        .map_err(|error| {
            let what = "the VM can't be written as JSON";
            ApiError::caused_by(ErrorKind::Internal, what, &error)
        })?;
        // What a mode has become on this host is no part of the configuration.
        for (console, name) in vm.map(|vm| vm.terminals()).into_iter().flatten() {
            told["config"][console]["file"] = name.into();
        }
        Ok(Reply::Json(told))
    }

    fn counters(&mut self) -> Answer {
        Reply::json(&self.up()?.counters())
    }
}

/// As the contract tells what is there already from what can't be.
fn why_not_added(error: &ConfigError) -> ErrorKind {
    if error.is_taken() {
        ErrorKind::WrongState
    } else {
        ErrorKind::BadRequest
    }
}

fn no_vm() -> ApiError {
    ApiError::new(ErrorKind::NotFound, "there is no VM; vm.create defines one")
}

fn refused_vcpus(error: &ResizeVcpusError) -> ApiError {
    let kind = match error {
        ResizeVcpusError::OutOfLimits(_) => ErrorKind::BadRequest,
        ResizeVcpusError::UnderWay { .. } => ErrorKind::Busy,
        _ => ErrorKind::Internal,
    };
    ApiError::from_error(kind, error)
}

fn wrong_state(message: &str) -> ApiError {
    ApiError::new(ErrorKind::WrongState, message)
}
