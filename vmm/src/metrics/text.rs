//! The numbers as text: names, labels, words. Sizes are bytes, times seconds.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, MetricEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::view::{Outcomes, View, VmPhase};
use crate::kvm::{ExitCounts, ExitReason};
use crate::memory::report::{Holder, RegionReport};

const PREFIX: &str = "daxhund";

/// All that a text is made of.
#[derive(Debug)]
pub(super) struct Moment {
    pub(super) view: Arc<View>,
    /// By number.
    pub(super) vcpus: Vec<Arc<ExitCounts>>,
    pub(super) pins: Pins,
    pub(super) now: Instant,
}

/// Pins of memory for devices.
#[derive(Debug)]
pub(super) struct Pins {
    pub(super) count: u64,
    pub(super) took: Duration,
    pub(super) done_bytes: u64,
    pub(super) total_bytes: u64,
}

/// Labels of a sample, in the order in which they stand.
type Labels = Vec<(&'static str, String)>;

pub(super) fn of(moment: Moment) -> String {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(moment));
    let mut text = String::new();
    // Only a writer that fails is an error, and a text does not.
    if let Err(error) = encode(&mut text, &registry) {
        tracing::error!(%error, "metrics can't be written; this is a defect of daxhund");
    }
    text
}

impl Moment {
    fn vm(&self, page: &mut Page<'_>) -> fmt::Result {
        let view = &self.view;
        page.gauges(
            "vm_state",
            "1 for the state that the VM is in",
            VmPhase::ALL.map(|state| {
                let labels = vec![("state", state.name().to_owned())];
                (labels, u64::from(state == view.state))
            }),
        )?;
        page.gauges(
            "memory_actual_bytes",
            "RAM that the guest has, what its balloon took apart",
            [(Vec::new(), view.memory_actual_bytes)],
        )?;
        let age = self.now.saturating_duration_since(view.at);
        page.gauges(
            "view_age_seconds",
            "How old what the owner told is: more than a moment while it is busy",
            [(Vec::new(), age.as_secs_f64())],
        )?;
        let exits = self.vcpus.iter().enumerate().flat_map(|(vcpu, counts)| {
            ExitReason::ALL.map(|reason| {
                let labels = vec![
                    ("vcpu", vcpu.to_string()),
                    ("reason", reason.name().to_owned()),
                ];
                (labels, counts.of(reason))
            })
        });
        page.counters("vcpu_exits", "Returns of vCPUs from KVM_RUN", exits)
    }

    fn memory(&self, page: &mut Page<'_>) -> fmt::Result {
        let view = &self.view;
        let regions = &view.regions;
        let sizes = regions.iter().map(|region| {
            let mut labels = place(region);
            labels.extend([
                ("kind", region.kind.name().to_owned()),
                ("state", region.state.clone()),
                ("backing", region.backing.kind.name().to_owned()),
                ("page_size", region.page_size.to_string()),
            ]);
            (labels, region.size)
        });
        page.gauges("region_bytes", "Guest memory by region and state", sizes)?;
        let poisoned = regions.iter().map(|region| {
            let bytes: u64 = region.poison.iter().map(|poison| poison.size).sum();
            (place(region), bytes)
        });
        page.gauges("region_poisoned_bytes", "Poison by region", poisoned)?;
        let pins = || {
            regions.iter().flat_map(|region| {
                let pinned = region.holders.iter().filter_map(Holder::pinned);
                pinned.map(move |pinned| (place(region), pinned))
            })
        };
        page.gauges(
            "region_pinned_bytes",
            "Guest memory that is pinned for passed-through devices, by region",
            pins().map(|(labels, pinned)| (labels, pinned.bytes)),
        )?;
        page.gauges(
            "region_pin_seconds",
            "How long pinning it took",
            pins().map(|(labels, pinned)| {
                let took = Duration::from_micros(pinned.took_us);
                (labels, took.as_secs_f64())
            }),
        )?;
        page.counters(
            "machine_checks",
            "Loads of the guest from memory that is gone or poisoned",
            [(Vec::new(), view.machine_checks)],
        )?;
        page.counters(
            "dropped_stores",
            "Stores of the guest to memory that is gone or poisoned",
            [(Vec::new(), view.dropped_stores)],
        )
    }

    fn pins(&self, page: &mut Page<'_>) -> fmt::Result {
        let space = || self.view.dma.iter();
        let labels = |kind: daxhund_pin::SpaceKind| vec![("space", kind.to_string())];
        page.gauges(
            "pinned_bytes",
            "Memory that passed-through devices reach",
            space().map(|facts| (labels(facts.kind), facts.dma.pinned_bytes)),
        )?;
        page.gauges(
            "pin_charged_bytes",
            "Of it, what is charged against RLIMIT_MEMLOCK",
            space().map(|facts| (labels(facts.kind), facts.dma.charged_bytes)),
        )?;
        let Pins {
            count,
            took,
            done_bytes,
            total_bytes,
        } = self.pins;
        let one = |value: u64| [(Vec::new(), value)];
        page.counters("pins", "Times that memory was pinned", one(count))?;
        page.counters(
            "pin_seconds",
            "Time that pinning took",
            [(Vec::new(), took.as_secs_f64())],
        )?;
        page.gauges(
            "pinning_done_bytes",
            "Of a pin that is under way, what is done",
            one(done_bytes),
        )?;
        page.gauges(
            "pinning_total_bytes",
            "Of a pin that is under way, what is to be done",
            one(total_bytes),
        )
    }

    fn removals(&self, page: &mut Page<'_>) -> fmt::Result {
        let view = &self.view;
        let Outcomes {
            held,
            let_through,
            refused,
            called_off,
            lost,
        } = view.removals;
        let outcomes = [
            ("held", held),
            ("let_through", let_through),
            ("refused", refused),
            ("called_off", called_off),
            ("lost", lost),
        ];
        page.counters(
            "removals",
            "Removals of device-dax memory by what became of them; each is held first, a loss apart",
            outcomes.map(|(outcome, count)| (vec![("outcome", outcome.to_owned())], count)),
        )?;
        page.gauges(
            "removals_waiting",
            "Removals that wait for this VMM",
            [(Vec::new(), view.waiting)],
        )?;
        page.gauges(
            "removal_guard",
            "1 when a removal guard is there",
            [(Vec::new(), u64::from(view.has_guard))],
        )
    }

    /// Each counter of `vm.counters` is a family of its own, whichever devices have it.
    fn devices(&self, page: &mut Page<'_>) -> fmt::Result {
        let view = &self.view;
        let labels = |id: &String| vec![("id", id.clone())];
        page.gauges(
            "backend_connected",
            "1 when a device's vhost-user backend is there",
            view.backends
                .iter()
                .map(|(id, connected)| (labels(id), u64::from(*connected))),
        )?;
        let mut families: BTreeMap<&str, Vec<(Labels, u64)>> = BTreeMap::new();
        for (id, counters) in &view.devices {
            for (name, count) in counters {
                let family = families.entry(name).or_default();
                family.push((labels(id), *count));
            }
        }
        families.into_iter().try_for_each(|(name, samples)| {
            let help = "As in vm.counters, by device";
            page.counters(&format!("device_{name}"), help, samples)
        })
    }
}

impl Collector for Moment {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page(encoder);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        page.info("build", "The program", &vec![("version", version)])?;
        self.vm(&mut page)?;
        self.memory(&mut page)?;
        self.pins(&mut page)?;
        self.removals(&mut page)?;
        self.devices(&mut page)
    }
}

/// What is written to.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn info(&mut self, name: &str, help: &str, labels: &Labels) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Info)?;
        family.encode_info(labels)
    }

    /// A family without samples is not there.
    fn gauges<V: EncodeGaugeValue>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels, V)>,
    ) -> fmt::Result {
        self.family(MetricType::Gauge, (name, help), samples, |sample, value| {
            sample.encode_gauge(&value)
        })
    }

    /// As [`Page::gauges`], of what only grows.
    fn counters<V: EncodeCounterValue>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels, V)>,
    ) -> fmt::Result {
        self.family(
            MetricType::Counter,
            (name, help),
            samples,
            |sample, value| sample.encode_counter::<NoLabelSet, _, u64>(&value, None),
        )
    }

    fn family<V>(
        &mut self,
        kind: MetricType,
        (name, help): (&str, &str),
        samples: impl IntoIterator<Item = (Labels, V)>,
        encode: impl Fn(&mut MetricEncoder<'_>, V) -> fmt::Result,
    ) -> fmt::Result {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return Ok(());
        }
        let mut family = self.0.encode_descriptor(name, help, None, kind)?;
        samples.try_for_each(|(labels, value)| {
            if labels.is_empty() {
                return encode(&mut family, value);
            }
            encode(&mut family.encode_family(&labels)?, value)
        })
    }
}

/// A zone around the MMIO hole is several regions: the address tells them apart.
fn place(region: &RegionReport) -> Labels {
    vec![
        ("id", region.id.clone()),
        ("gpa", format!("{:#x}", region.gpa)),
    ]
}
